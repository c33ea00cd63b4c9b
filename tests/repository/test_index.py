import msgspec

from sardonyx.repository.index import IndexEntry, index, merge


def test_models_are_described_by_their_newest_served_version(repository, publish):
    publish("tiny")
    folder = publish("tiny")
    size = sum(path.stat().st_size for path in folder.iterdir())
    (entry,) = index(repository)
    assert entry.fingerprint
    assert [msgspec.structs.replace(entry, fingerprint="")] == [
        IndexEntry(
            name="tiny",
            versions=[2],
            family="llm",
            precision="int4",
            target="cpu",
            size_bytes=size,
            created="2026-11-23T00:00:00Z",
        )
    ]


def test_broken_models_are_listed_with_their_reason(repository, publish):
    (publish("a") / "model.onnx").unlink()
    (publish("b") / "manifest.json").write_text("{}")
    publish("c", 'name: "c"')
    (repository.root / "c/config.pbtxt").write_text("?")
    publish("d").rename(repository.root / "d/01")
    (repository.root / "d/config.pbtxt").write_text("")
    a, b, c, d = index(repository)
    assert (a.family, a.precision) == ("llm", "int4")
    assert a.reason.endswith("model.onnx: is missing although the manifest lists it")
    assert (b.family, b.versions) == ("", [1])
    assert "manifest.json" in b.reason
    assert (c.versions, c.size_bytes) == ([], 0)
    assert "config.pbtxt:1" in c.reason
    assert d.reason == "has no version to serve"


def test_plain_model_is_of_the_family_tensors(repository, publish):
    folder = publish("plain")
    (folder / "manifest.json").unlink()
    (entry,) = index(repository)
    assert (entry.family, entry.precision, entry.reason) == ("tensors", "", "")


def test_fingerprint_changes_with_any_file_of_the_model(repository, publish):
    folder = publish("tiny")

    def fingerprint():
        return index(repository)[0].fingerprint

    seen = [fingerprint(), fingerprint()]
    assert seen[0] == seen[1]
    (folder / "tokenizer.json").write_bytes(b"{} ")
    seen.append(fingerprint())
    (folder.parent / "config.pbtxt").write_text("# edited")
    seen.append(fingerprint())
    (folder.parent / "labels.txt").write_text("a")
    seen.append(fingerprint())
    publish("tiny")
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_fingerprint_changes_when_a_link_leads_elsewhere(repository, publish):
    publish("tiny")
    publish("tiny")
    link = repository.root / "tiny/3"
    link.symlink_to("1")
    first = index(repository)[0].fingerprint
    link.unlink()
    link.symlink_to("2")
    assert index(repository)[0].fingerprint != first


def test_a_folder_that_is_changed_while_it_is_read_is_told_as_a_reason(repository, publish, monkeypatch):
    publish("tiny")

    def vanishes(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("sardonyx.repository.index.version_problems", vanishes)
    (entry,) = index(repository)
    assert (entry.reason, entry.fingerprint) == ("cannot be read: No such file or directory", "")


def test_a_name_in_two_repositories_is_served_from_neither():
    first, second = IndexEntry(name="a", versions=[1], fingerprint="1"), IndexEntry(name="a", versions=[2])
    other = IndexEntry(name="b", versions=[1])
    merged = merge([[first], [other, second]])
    assert [entry.name for entry in merged] == ["a", "b"]
    assert merged[0].reason == "model appears in two or more repositories"
    assert merged[1] == other
