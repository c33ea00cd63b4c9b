from sardonyx.serving.picture_store import KEPT_S, PictureStore, StoredPicture

SIZE = 10_000


class Clock:
    now_s = 50.0

    def __call__(self):
        return self.now_s


def picture(value=0, size=SIZE):
    return StoredPicture(bytes([value]) * size, "image/png")


def make_store(num_pictures=3):
    clock = Clock()
    return PictureStore(num_pictures * (SIZE + 2000), clock), clock


def test_picture_is_found_by_a_name_that_nobody_guesses():
    store, _ = make_store(100)
    names = [store.add(picture(value), suffix=".png") for value in range(50)]
    assert len(set(names)) == 50
    assert all(len(name) == 32 + 4 and name.endswith(".png") for name in names)
    assert [store.get(name).data[0] for name in names] == list(range(50))
    for other in ("", names[0][:-4], names[0][:-1], "../etc/passwd"):
        assert store.get(other) is None


def test_picture_is_kept_for_an_hour():
    store, clock = make_store()
    name = store.add(picture())
    clock.now_s += KEPT_S - 1
    assert store.get(name) is not None
    clock.now_s += 1
    assert store.get(name) is None
    assert (store.num_pictures, store.size_bytes) == (0, 0)


def test_old_pictures_make_room_even_if_nobody_asks_for_them():
    store, clock = make_store()
    for _ in range(3):
        store.add(picture())
    clock.now_s += KEPT_S
    store.add(picture())
    assert store.num_pictures == 1


def test_pictures_used_last_stay_when_the_store_is_full():
    store, _ = make_store(3)
    names = [store.add(picture(value)) for value in range(3)]
    assert store.get(names[0]) is not None
    names.append(store.add(picture(3)))
    assert [store.get(name) is not None for name in names] == [True, False, True, True]
    assert store.size_bytes <= 3 * (SIZE + 2000)


def test_picture_larger_than_the_store_is_not_kept_and_takes_none_away():
    store, _ = make_store(2)
    name = store.add(picture())
    assert store.add(picture(size=3 * SIZE)) is None
    assert store.get(name) is not None


def test_store_of_no_bytes_keeps_none():
    store = PictureStore(0)
    assert store.add(picture(size=1)) is None
    assert store.num_pictures == 0
