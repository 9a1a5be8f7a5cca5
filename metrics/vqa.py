"""VQA accuracy, as in vqaEval.py of GT-Vision-Lab/VQA: an answer is right if three other people say the same.

    accuracy(a) = mean_i min(1, #{j != i : truth_j = a} / 3)
"""

import re

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
           "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
# The official table by its values: its keys are each value less any one apostrophe (couldnt've, couldn'tve).
CONTRACTED = [
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't",
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've",
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've",
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll",
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd",
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've",
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't",
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've",
]
CONTRACTIONS = {word[:i] + word[i + 1:]: word
                for word in " ".join(CONTRACTED).split() for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"     # the one entry that the official table has the wrong way round


def vqa_strip(text: str) -> str:
    """Newline and tab become a blank, the outside is stripped: done to all answers before any comparison."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_punctuation(text: str) -> str:
    """A mark goes if the *original* text has it beside a blank, or a comma between digits; else it becomes a
    blank. Then every "." not before a digit goes, but 32 at most: the official call passes re.UNICODE, 32, as
    its `count` (and has a slip in its look-behind, so what stands before the "." does not matter)."""
    tight = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        beside_a_blank = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if tight or beside_a_blank else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def vqa_digits_articles(text: str) -> str:
    """Lower case, number words to digits ("none" is 0), a/an/the out, apostrophes back into contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_normalize(text: str) -> str:
    """What the official evaluation compares whenever the annotators do not all agree."""
    return vqa_digits_articles(vqa_punctuation(vqa_strip(text)))


def vqa_accuracy(answer: str, truths: list[str]) -> float:
    """VQA accuracy in [0, 1] of an answer against the (usually 10) annotators' truths. As in the official
    tool nothing is normalised, the answer included, when all truths are the same string; and one truth alone
    has no others, so it scores 0. Raises ValueError without truths."""
    if not truths:
        raise ValueError("vqa_accuracy needs at least 1 truth, got 0")
    answer = vqa_strip(answer)
    truths = [vqa_strip(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer = vqa_normalize(answer)
        truths = [vqa_normalize(truth) for truth in truths]
    hits = [truth == answer for truth in truths]
    return sum(min(1, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def vqa_accuracies(answers: list[str], truths: list[list[str]]) -> list[float]:
    """`vqa_accuracy` of N answers, each against its own annotators' truths."""
    return [vqa_accuracy(answer, mine) for answer, mine in zip(answers, truths, strict=True)]
