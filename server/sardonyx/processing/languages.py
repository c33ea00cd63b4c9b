"""The languages that Whisper knows, by its codes and by everything else that callers call them. Floor 2, pure.

Source: openai-whisper's ``tokenizer.py`` for the codes and names; ISO 639-1 and 639-3, and the bibliographic codes of
639-2; IANA's language subtag registry for codes that were replaced.
"""

from types import MappingProxyType

LANGUAGE_NAMES = MappingProxyType(
    {
        "en": "english",
        "zh": "chinese",
        "de": "german",
        "es": "spanish",
        "ru": "russian",
        "ko": "korean",
        "fr": "french",
        "ja": "japanese",
        "pt": "portuguese",
        "tr": "turkish",
        "pl": "polish",
        "ca": "catalan",
        "nl": "dutch",
        "ar": "arabic",
        "sv": "swedish",
        "it": "italian",
        "id": "indonesian",
        "hi": "hindi",
        "fi": "finnish",
        "vi": "vietnamese",
        "he": "hebrew",
        "uk": "ukrainian",
        "el": "greek",
        "ms": "malay",
        "cs": "czech",
        "ro": "romanian",
        "da": "danish",
        "hu": "hungarian",
        "ta": "tamil",
        "no": "norwegian",
        "th": "thai",
        "ur": "urdu",
        "hr": "croatian",
        "bg": "bulgarian",
        "lt": "lithuanian",
        "la": "latin",
        "mi": "maori",
        "ml": "malayalam",
        "cy": "welsh",
        "sk": "slovak",
        "te": "telugu",
        "fa": "persian",
        "lv": "latvian",
        "bn": "bengali",
        "sr": "serbian",
        "az": "azerbaijani",
        "sl": "slovenian",
        "kn": "kannada",
        "et": "estonian",
        "mk": "macedonian",
        "br": "breton",
        "eu": "basque",
        "is": "icelandic",
        "hy": "armenian",
        "ne": "nepali",
        "mn": "mongolian",
        "bs": "bosnian",
        "kk": "kazakh",
        "sq": "albanian",
        "sw": "swahili",
        "gl": "galician",
        "mr": "marathi",
        "pa": "punjabi",
        "si": "sinhala",
        "km": "khmer",
        "sn": "shona",
        "yo": "yoruba",
        "so": "somali",
        "af": "afrikaans",
        "oc": "occitan",
        "ka": "georgian",
        "be": "belarusian",
        "tg": "tajik",
        "sd": "sindhi",
        "gu": "gujarati",
        "am": "amharic",
        "yi": "yiddish",
        "lo": "lao",
        "uz": "uzbek",
        "fo": "faroese",
        "ht": "haitian creole",
        "ps": "pashto",
        "tk": "turkmen",
        "nn": "nynorsk",
        "mt": "maltese",
        "sa": "sanskrit",
        "lb": "luxembourgish",
        "my": "myanmar",
        "bo": "tibetan",
        "tl": "tagalog",
        "mg": "malagasy",
        "as": "assamese",
        "tt": "tatar",
        "haw": "hawaiian",
        "ln": "lingala",
        "ha": "hausa",
        "ba": "bashkir",
        "jw": "javanese",
        "su": "sundanese",
        "yue": "cantonese",
    }
)
"""By code, in the order of the tokens; ``verbose_json`` has the names. Models before large-v3 lack the last one."""

_LONG_CODES = """
    afr=af amh=am ara=ar asm=as aze=az bak=ba bel=be ben=bn bod=bo tib=bo bos=bs bre=br bul=bg cat=ca ces=cs cze=cs
    cmn=zh zho=zh chi=zh cym=cy wel=cy dan=da deu=de ger=de ell=el gre=el eng=en est=et eus=eu baq=eu fao=fo fas=fa
    per=fa fil=tl fin=fi fra=fr fre=fr glg=gl guj=gu hat=ht hau=ha heb=he hin=hi hrv=hr hun=hu hye=hy arm=hy ind=id
    isl=is ice=is ita=it jav=jw jpn=ja kan=kn kat=ka geo=ka kaz=kk khm=km kor=ko lao=lo lat=la lav=lv lin=ln lit=lt
    ltz=lb mal=ml mar=mr mkd=mk mac=mk mlg=mg mlt=mt mon=mn mri=mi mao=mi msa=ms may=ms mya=my bur=my nep=ne nld=nl
    dut=nl nno=nn nob=no nor=no oci=oc pan=pa pol=pl por=pt prs=fa pus=ps ron=ro rum=ro rus=ru san=sa sin=si slk=sk
    slo=sk slv=sl sna=sn snd=sd som=so spa=es sqi=sq alb=sq srp=sr sun=su swa=sw swe=sv tam=ta tat=tt tel=te tgk=tg
    tgl=tl tha=th tuk=tk tur=tr ukr=uk urd=ur uzb=uz vie=vi yid=yi yor=yo
"""
_OTHER_NAMES = {
    "bahasa indonesia": "id",
    "bahasa melayu": "ms",
    "bokmal": "no",
    "bokmål": "no",
    "burmese": "my",
    "castilian": "es",
    "farsi": "fa",
    "filipino": "tl",
    "flemish": "nl",
    "haitian": "ht",
    "letzeburgesch": "lb",
    "mandarin": "zh",
    "moldavian": "ro",
    "moldovan": "ro",
    "norwegian nynorsk": "nn",
    "panjabi": "pa",
    "pushto": "ps",
    "sinhalese": "si",
    "valencian": "ca",
}
_OTHER_CODES = {"in": "id", "iw": "he", "ji": "yi", "jv": "jw", "mo": "ro", "nb": "no", "zh-yue": "yue"}
"""Whisper has Javanese by a code that was withdrawn."""

_CODES = {
    **{name: code for code, name in LANGUAGE_NAMES.items()},
    **dict(pair.split("=") for pair in _LONG_CODES.split()),
    **_OTHER_NAMES,
    **_OTHER_CODES,
    **{code: code for code in LANGUAGE_NAMES},
}


def language_code(name: str) -> str | None:
    """Whisper's code of a language, or ``None`` for what it does not know.

    Args:
        name: a code of two or three letters, also with a script or a region behind it (``pt_BR``, ``zh-Hant-TW``), or
            the English name; in any case.
    """
    wanted = name.strip().casefold().replace("_", "-")
    code = _CODES.get(wanted) or _CODES.get(wanted.replace("-", " "))
    if code is None and (primary := wanted.partition("-")[0]) != wanted and len(primary) <= 3:
        return _CODES.get(primary)
    return code
