"""How the two reference programs of VQA accuracy reduce an answer before they compare it.

Every quirk below is theirs and is kept, because published numbers rest on it: the VQA evaluation program
(GT-Vision-Lab/VQA, `vqaEval.py`) and TextVQA's (mmf's `EvalAIAnswerProcessor`).
"""

import re

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
# Meant as "not between digits", but the look-behind is misspelt upstream: only a digit behind the point protects it.
_POINT = re.compile(r"\.(?!\d)")
# Upstream passes a flag where the substitution takes its count, so that later points of one answer stay.
_POINTS_REMOVED = int(re.UNICODE)

_CONTRACTED = re.findall(
    r"\S+",
    """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""",
)
# Each entry is found by its spelling with one apostrophe left out; `somebody'd` stands the wrong way round upstream.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_form(answer: str) -> str:
    """The answer as the VQA program compares it: no punctuation, articles or capitals, digits for number words."""
    return _without_articles(_without_punctuation(plain_spaces(answer)))


def evalai_form(answer: str) -> str:
    """The answer as TextVQA's program compares it: commas, question marks and possessives parted off first."""
    plain = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_form(plain)


def plain_spaces(answer: str) -> str:
    """Tabs and line ends as spaces, none at the ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Signs beside a space vanish, signs within a word become a space; with `1,000` in the text all of them vanish."""
    thousands = _THOUSANDS.search(text) is not None
    kept = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        kept = kept.replace(sign, "" if beside_space or thousands else " ")
    return _POINT.sub("", kept, count=_POINTS_REMOVED)


def _without_articles(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
