import pytest

from sardonyx.processing.languages import LANGUAGE_NAMES, language_code


def test_there_are_a_hundred_languages_named_as_openai_names_them():
    assert len(LANGUAGE_NAMES) == 100
    assert len(set(LANGUAGE_NAMES.values())) == 100
    assert list(LANGUAGE_NAMES)[:5] == ["en", "zh", "de", "es", "ru"]
    assert list(LANGUAGE_NAMES)[-3:] == ["jw", "su", "yue"]
    names = {"en": "english", "yue": "cantonese", "jw": "javanese", "haw": "hawaiian", "ht": "haitian creole"}
    assert {code: LANGUAGE_NAMES[code] for code in names} == names
    assert LANGUAGE_NAMES["nn"] == "nynorsk"
    assert all(name == name.lower() for name in LANGUAGE_NAMES.values())


@pytest.mark.parametrize("code", LANGUAGE_NAMES)
def test_a_code_and_its_name_are_known_in_any_case(code):
    name = LANGUAGE_NAMES[code]
    for spelling in (code, code.upper(), name, name.title(), f" {name} ", f"{code}-XX", f"{code.upper()}_Latn_ZZ"):
        assert language_code(spelling) == code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("en-US", "en"),
        ("pt_BR", "pt"),
        ("zh-Hant-TW", "zh"),
        ("zh-yue", "yue"),
        ("Castilian", "es"),
        ("mandarin", "zh"),
        ("Flemish", "nl"),
        ("Haitian-Creole", "ht"),
        ("Burmese", "my"),
        ("norwegian_nynorsk", "nn"),
        ("eng", "en"),
        ("deu", "de"),
        ("ger", "de"),
        ("cmn", "zh"),
        ("jv", "jw"),
        ("iw", "he"),
        ("nb-NO", "no"),
        ("deu-AT", "de"),
    ],
)
def test_other_names_of_a_language_are_known(name, code):
    assert language_code(name) == code


@pytest.mark.parametrize("name", ["", " ", "-", "_US", "xx", "klingon", "english-us-accent", "auto", "en,de", "e n"])
def test_what_is_no_language_has_no_code(name):
    assert language_code(name) is None
