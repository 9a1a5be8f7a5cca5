"""Captions to tokens as pycocoevalcap's PTBTokenizer does, without Java. Read it only if you must.

Stanford PTBTokenizer 3.4.1 -preserveLines -lowerCase, less punctuation, is a list of rules. At each position
the rule that reaches furthest wins, what it looks ahead at included; of equals, the first. Case matters in
[classes], as in the original, and not in (?i:...).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

LISTS = json.loads(Path(__file__).with_name("ptb_lists.json").read_text(encoding="utf-8"))


def character_class(test: Callable[[str], bool]) -> str:
    """The characters below U+10000 that pass `test`, as ranges. The original knows none above, and of the
    letters those of Unicode 6.0; here the few hundred younger ones are letters as well."""
    passed = "".join(chr(c) if test(chr(c)) else " " for c in range(0x10000))
    return "[" + "".join(f"{run[0]}-{run[-1]}" for run in passed.split()) + "]"


# <NAME> in a pattern stands for the part NAME. SYMBOLS are tokens (the rest of Unicode's, emoji too, separate
# words and vanish), MARKS count as letters: the soft hyphen, modifiers, combining vowels.
PARTS = {name: f"[{''.join(lines)}]" for name, lines in LISTS["characters"].items()}
PARTS |= {name: "|".join(" ".join(lines).split()) for name, lines in LISTS["words"].items()}
PARTS |= {
    "L": character_class(str.isalpha),
    "D": character_class(str.isdecimal),
    "CHAR": "(?:<L>|<MARKS>|&[aeiouAEIOU](?i:acute|grave|uml);)",
    "CD": "(?:<CHAR>|<D>)",
    "LD": "(?:<L>|<D>)",
    "S": "[ \t\xa0\u2000-\u200a\u3000]",
    "SN": "[ \t\xa0\u2000-\u200a\u3000\n]",
    "APOS": "(?:['\x92\u2019]|(?i:&apos;))",
    "TICK": "(?:['\x92\u2019`\x91\u2018\u201b]|(?i:&apos;))",
    "WORD": r"<CHAR><CD>*(?:[.!?]<CHAR><CD>*)*",
    "AUX": "<APOS>(?:[msdMSD]|(?i:re|ve|ll))",
    "NOT": "(?i:n)<TICK>(?i:t)",
    "ACRONYM": r"(?i:u\.s\.-u\.k|u\.s\.-u\.s\.s\.r|(?:canada|sino|korean|eu|japan|non)-u\.s)"
               r"|[A-Za-z](?:\.[A-Za-z])+",
    "ABBR": r"(?:(?i:<DATES>)|<CAPITALS>)\.",
    "TITLE": "(?:<ACRONYM>|[A-Za-z]|(?i:<TITLES>))",
    "NAME": "[A-Za-z][A-Za-z0-9_:.-]*",
    "VALUE": r"""'[^'\n]*'|"[^"\n]*\"""",
    "TAG": r"<(?:[!?][A-Za-z-][^>\n]*|<NAME>(?: +(?:<NAME>|<NAME> *= *<VALUE>))* */?|/<NAME>) *>",
    "NEXT": "<SN>+(?:<STARTERS>|<TAG>)<SN>",  # the next sentence begins
    "OF": "(?:[dDoOlL]<TICK><LD>)?",  # d'Or, O'Neil
    "HYPHENED": r"<OF><LD>+(?:[-_\u058a\u2010\u2011]<OF><LD>+)*",
    "COMPOUND": r"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:<ACRONYM>\.|[A-Za-z0-9\xad]+))+",
    "FIRM": "[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+",
    "SIDE": "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}",
    "URLEND": r"""[^ \t\n\f\r"<>|.!?(){},-]""",
    "PATH": r"""/[^ \t\n\f\r"<>|()]+<URLEND>""",
    "PAUSE": "[,;:\u3001]",
}


def expand(pattern: str) -> str:
    """Replaces every <NAME> by its part, and the names in that in turn."""
    while (longer := re.sub("<([A-Z]+)>", lambda m: f"(?:{PARTS[m[1]]})", pattern)) != pattern:
        pattern = longer
    return pattern


# What becomes of a token: (pattern, what replaces it), one after the other.
PLAIN = []
DROP = [(".+", "")]
SOFT_HYPHEN = [("\xad", "")]
BLANK = [(" ", "\xa0")]          # str.split() splits there later, as in pycocoevalcap
ROUND = [(r"\(", "-lrb-"), (r"\)", "-rrb-")]
AMPERSAND = [("(?i:&amp;)", "&")]
QUOTES = [                       # directed ones in LaTeX style; others („) and pairs (’”) stay
    ("&apos;|[\x92’›]", "'"), ("[\x91‘‛‹]", "`"), ('["\x94”»]|&quot;', "''"), ("[\x93“«]", "``")]
SYMBOL = [                       # signs with a spelling of their own, and a run of hyphens, a dash up to four
    *ROUND, (r"\[", "-lsb-"), (r"\]", "-rsb-"), ("{", "-lcb-"), ("}", "-rcb-"), ("^-{3,4}$", ""),
    ("¢", "cents"), ("£", "#"), ("[€¤₠\x80]", "$"), ("¼", "1/4"), ("½", "1/2"), ("¾", "3/4"), ("⅓", "1/3"),
    ("⅔", "2/3"), ("(?i:&lt;)", "<"), ("(?i:&gt;)", ">")]
RULES = [  # (what becomes of the token, the token[, what must follow it])
    (PLAIN, "(?i:can)", "(?i:not)"), (PLAIN, "(?i:gon|wan)", "(?i:na)"), (PLAIN, "(?i:got)", "(?i:ta)"),
    (PLAIN, "(?i:lem|gim)", "(?i:me)"), (PLAIN, "<APOS>(?i:t)", "(?i:is|was)"),
    # tags, entities
    (BLANK, "<TAG>"), (DROP, "&(?i:md|mdash|ndash);|[\x96\x97\u2013-\u2015]"), (AMPERSAND, "(?i:&amp;)"),
    (PLAIN, "&(?i:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);"),
    # words, and words with an apostrophe
    (SOFT_HYPHEN, "<WORD>", "<AUX>"), (SOFT_HYPHEN, "[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*", "<NOT>"),
    (SOFT_HYPHEN, "<WORD>"),
    (PLAIN, "(?i:<APOS>n<APOS>?|(?:dunkin|somethin|ol)<APOS>|<APOS>(?:em|[2-9]0s|till?|cause)|c<APOS>mon"
            r"|o<APOS>clock|cont<APOS>d\.?|nor<APOS>easter|e<APOS>er|s<APOS>mores|ev<APOS>ry|li<APOS>l"
            r"|nat<APOS>l|d<APOS>ye|o<TICK>o)"),
    (PLAIN, "[lLdDjJ]<APOS>"), (PLAIN, "[A-HJ-XZn]<TICK><L>{2,}"),
    (PLAIN, "<L>+[aeiouyAEIOUY]<TICK>[aeiouA-Z]<L>*"), (PLAIN, "[yY]<APOS>", "<L>"),
    # addresses; ",-_" is a range, a slip of the original, so a bare domain has neither capitals nor digits
    (PLAIN, r"""(?i:https?)://[^ \t\n\f\r"<>|(){}]+<URLEND>"""),
    (PLAIN, r"""(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+?[a-zA-Z]{2,4}<PATH>"""),  # lazy: a path goes on
    (PLAIN, r"""(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""),
    (PLAIN, r"""(?:[^ \t\n\f\r"`'<>|!(){},-_$]+\.)+(?i:com|net|org|edu)<PATH>?"""),
    (PLAIN, r"""(?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r"<>|(){}\xa0]*@(?:[^ \t\n\f\r"<>|().{}\xa0]+\.)*"""
            r"""[^ \t\n\f\r"<>|().{}\xa0]+(?:(?i:&gt;)|>)?"""),
    (PLAIN, "@[a-zA-Z_][a-zA-Z_0-9]*|#<CHAR>+"), (PLAIN, r"[Cc]\+\+|[CcFf]#"),
    (QUOTES, "<AUX>|<NOT>", "[^A-Za-z]"),
    # dates, numbers, fractions, years
    (PLAIN, "<D>{1,2}[-/]<D>{1,2}[-/]<D>{2,4}"),
    (SOFT_HYPHEN, "[-+]?(?:<D>*(?:[.:,\xad\u066b\u066c]<D>+)+|<D>+)"),
    (PLAIN, "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    (BLANK, r"(?:<D>{1,4}[- \xa0])?<D>{1,4}(?:\\?/|\u2044)<D>{1,4}"),
    (SYMBOL, "[\xbc-\xbe\u2153-\u215e]"),
    (AMPERSAND, "(?i:-[lr][rcs]b-|c[.]d[.]s|pro-|anti-|s(?:&|&amp;)(?:p-500|ls)|cap<APOS>n|c<APOS>est)"),
    (PLAIN, "<APOS>[0-9]{2}", "<SN>"), (SOFT_HYPHEN, r"<WORD>\.", "<PAUSE>"),
    (BLANK + ROUND, r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
            r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}"
            r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    (DROP, "'", "[A-Za-z][^ \t\n\r\xa0]"),
    # abbreviations keep their full stop; one that ends a sentence as well is read again and removed
    (PLAIN, "<ABBR>", "<SN>(?:<SN>|[A-Z]|<TAG>)"), (PLAIN, "<ABBR>", r"[\s\S]{2}"), (PLAIN, "<ABBR>"),
    (PLAIN, "[A-Za-z]", r"\.<NEXT>"), (PLAIN, r"<ACRONYM>\.", "<NEXT>"),
    (PLAIN, r"<TITLE>\."), (PLAIN, "<TITLE>", "<SN>"),
    (PLAIN, r"(?i:<NUMBERED>)\.", "<SN>?<D>"), (PLAIN, r"(?i:pp?t[ye]s?|co)\.", "<S>(?i:ltd|lim)"),
    (PLAIN, r"<CD>+(?:\.<CD>+)*\.(?i:<FILES>)", "<SN>|[.?!,]"),
    # compounds
    (PLAIN, r"<HYPHENED>\.", "<PAUSE>"), (PLAIN, "<HYPHENED>"),
    (AMPERSAND, r"<FIRM>\.", "<PAUSE>"), (AMPERSAND, "<FIRM>"), (PLAIN, r"<SIDE>(?:\\?/<SIDE>){1,2}"),
    (SOFT_HYPHEN, r"<COMPOUND>\.", "<PAUSE>"), (SOFT_HYPHEN, "<COMPOUND>"),
    # smileys; in the second ".[^x=" begins another slip: it runs to the next "<>]"
    (ROUND, r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]"),
    (ROUND, r"[\^x=~<>]\.\[\^[xX]=(?:(?!<>)[^\n])*<>\]|[-^x=~<>']_[-^x=~<>']"
            r"|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"),
    # signs
    (PLAIN, "<<|>>"), (SYMBOL, "[<>]|(?i:&[lg]t;)|-+"), (DROP, r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|[\x85\u2026]"),
    (PLAIN, r"@+|_+|#+|[?!]+"), (PLAIN, r"\*+|(?:\\\*){1,3}"),
    (QUOTES, "[`\u2018-\u201f\x91-\x94\u2039\u203a\xab\xbb]{1,2}|''|<APOS>|\"|(?i:&quot;)"),
    (QUOTES, "<AUX>|<NOT>"), (PLAIN, r"[A-Z]*\$"),
    (SYMBOL, r"[\xa2-\xa5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6()\[\]{}]"),
    (PLAIN, "<SYMBOLS>"), (PLAIN, "\n"), (DROP, "<S>+|(?i:&nbsp;)"),
]
COMPILED = [(edits, re.compile(expand(f"({token})(?:{''.join(ahead)})"))) for edits, token, *ahead in RULES]
# Nearly all text is words between blanks, which only the rule for words can touch. Whole runs of them are
# taken in one bite, which stops at words that are split in two and at words that may keep their full stop.
SPLIT = "cannot|gonna|gotta|lemme|gimme|wanna"
STOPPED = expand(f"{SPLIT}|[a-z]|<DATES>|<TITLES>|<NUMBERED>|<CAPITALS>")
WORDS = re.compile(rf"(?:(?!(?i:{SPLIT})[^A-Za-z])[A-Za-z]+(?:,? *\n|,? +)"
                   rf"|(?!(?i:{STOPPED})\.)[A-Za-z]+\.(?: *\n| +(?=[A-Za-z])))+")
# "-LRB-" stands in the original list, too, where it comes too late.
REMOVED = {"", "'", "''", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def ptb_tokenize(texts: list[str]) -> list[str]:
    """Caption tokens joined by blanks, one string a text. As in the original the list is read as *one* text,
    a line each: an abbreviation at the end of a line depends on how the next begins. Three differences, where
    it loses count of the lines or depends on the end of the file: any other line break is a blank, a quoted
    value in a tag ends with its line, and the last line ends in a line break too."""
    text = "".join(re.sub("[\n\r\x0b\x0c\u2028\u2029]", " ", line) + "\n" for line in texts)
    tokens = []
    at = 0
    while at < len(text):
        if run := WORDS.match(text, at):
            tokens.append(run[0].replace(",", "").replace(".", "").lower())
            at = run.end()
            continue
        matches = [(match, edits) for edits, rule in COMPILED if (match := rule.match(text, at))]
        if not matches:                                     # a character the tokenizer does not know
            at += 1
            continue
        match, edits = max(matches, key=lambda found: found[0].end())           # of equals the first
        token = match[1]
        for old, new in edits:
            token = re.sub(old, new, token)
        if token.lower() not in REMOVED:
            tokens.append(token.lower())
        at = match.end(1)
    lines = " ".join(tokens).split("\n")[:-1]
    return [" ".join(filter(None, line.rstrip().split(" "))) for line in lines]
