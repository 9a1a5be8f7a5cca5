"""Scores of answers and captions, as the official tools give them: strings in, numbers out.

    VQA       accuracy(a) = mean_i min(1, #{j != i : truth_j = a} / 3)        GT-Vision-Lab/VQA, vqaEval.py
    CIDEr-D   10 · mean_n mean_r  e^{-(l_c - l_r)² / 2σ²} · <min(g_c, g_r), g_r> / (|g_c| |g_r|)      n = 1..4
              g(w) = count(w) · (log N - log max(1, df(w)))                   Vedantam et al. 2015, pycocoevalcap
    CHAIR     CHAIRi = invented mentions / mentions,  CHAIRs = captions that invent / captions,
              recall = Σ |truth ∩ mentioned| / Σ |truth|                      Rohrbach et al. 2018
    tokens    Stanford PTBTokenizer 3.4.1 -preserveLines -lowerCase, less punctuation: those of pycocoevalcap

No file formats, no model, no Java: grouping by answer type or question type is results.py's.
"""

import re
from collections.abc import Callable
from itertools import chain

import numpy as np

# ------------------------------------------------------------------------------------------- VQA accuracy

NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
# The official table by its values: its keys are each value less any one apostrophe (couldnt've, couldn'tve).
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the one entry the official table has the wrong way round


def vqa_strip(text: str) -> str:
    """Newline and tab become a blank, the outside is stripped: done to every answer, before anything is compared."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_punctuation(text: str) -> str:
    """A mark goes if the *original* text has it beside a blank or has a comma between digits, else it becomes a blank.
    Then every "." not followed by a digit goes, but 32 at most: the official call has re.UNICODE, 32, as its `count`
    (and a slip in its look-behind, so what stands before the "." does not matter)."""
    tight = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if tight or mark + " " in text or " " + mark in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def vqa_digits_articles(text: str) -> str:
    """Lower case, number words to digits ("none" is 0), a/an/the out, then apostrophes back into contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_normalize(text: str) -> str:
    """What the official VQA evaluation compares, whenever the annotators do not all agree."""
    return vqa_digits_articles(vqa_punctuation(vqa_strip(text)))


def vqa_accuracy(answer: str, truths: list[str]) -> float:
    """Official VQA accuracy in [0, 1] of `answer` against the (usually 10) annotators' `truths`: for each annotator
    min(1, matches among the *others* / 3), then the mean. As in the official tool nothing is normalised, `answer`
    included, when all truths are the same string; and one truth alone has no others, so it scores 0.
    Raises ValueError without truths."""
    if not truths:
        raise ValueError("vqa_accuracy needs at least 1 truth, got 0")
    answer, truths = vqa_strip(answer), [vqa_strip(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer, truths = vqa_normalize(answer), [vqa_normalize(truth) for truth in truths]
    hits = [truth == answer for truth in truths]
    return sum(min(1, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


# ------------------------------------------------------------------------------------------- Penn-Treebank tokens
# The tokenizer is a list of rules. At each position the rule that reaches furthest wins, what it looks ahead at
# included; of equals, the first. Case matters in [classes], as in the original, and not in (?i:...).

SYMBOLS = (  # those that are tokens; the rest of Unicode's symbols, emoji too, separates words and vanishes
    r"!#$%&+,.:;=?@\\^_|~/" "\xa1\xa6-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6"
    "\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8"
    "\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e"
    "\u2080-\u208e\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a"
    "\u213b\u2140-\u2144\u214a-\u214d\u214f\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20"
    "\uff3b-\uff40\uff5b-\uff65")
MARKS = (  # signs that count as letters: the soft hyphen, modifiers, combining vowels
    "\xad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6\u0483-\u0487"
    "\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    "\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    "\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3\u0a01-\u0a03"
    "\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    "\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u1885\u1886")


def either(words: str) -> str:
    return "|".join(words.split())


DATES_FIRMS = either(r"""jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri ala ariz calif colo
    conn ct dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc? wyo inc cos? corp pp?t[ye]s?
    ltd plc rt bancorp bldg bhd assn univ intl sys tel est ext sq jr sr bros (?:ed|ph)\.d blvd rd esq etc al seq""")
TITLES = either(r"""mrs? ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt ste? ave
    pres lieut hon brig co?mdr pfc spc supts? det mt ft adj adv asst assoc ens insp mlle mme msgr sfc vs alex wm jos cie
    a\.k\.a cf treas ph invt elec natl m[ft]g dept""")
BEFORE_NUMBERS = either("ca figs? prop nos? art bldg pp op")
CAPITALISED = either("A(?i:rk|z) D(?i:el) I(?i:ll) L(?i:a) M(?i:ass|iss) O(?i:re) P(?i:a) T(?i:ex) W(?i:ash)")
STARTERS = either(r"""A A(?i:bout|ccording|dditionally|fter|n|s|t) B(?i:ut) E(?i:arlier) H(?i:e|er|ere|owever)
    I(?i:f|n|t) L(?i:ast) M(?i:any|ore|r\.|s\.) N(?i:ow) O(?i:nce|ne|ther|ur) S(?i:he|ince|o|ome|uch)
    T(?i:hat|he|heir|hen|here|hese|hey|his) W(?i:e|hat|hen|hile) Y(?i:et|ou)""")
FILES = either("""bat bmp c cgi class cpp dll docx? exe gif gz html? h jar java jpe?g mov mp3 pdf php pl png ppt ps py
    sql tar txt wav x xml zip""")


def character_class(test: Callable[[str], bool]) -> str:
    """The characters below U+10000 that pass `test`, as ranges. The original knows none above, and of the letters those
    of Unicode 6.0; here the few hundred younger ones are letters as well."""
    passed = "".join(chr(c) if test(chr(c)) else " " for c in range(0x10000))
    return "[" + "".join(f"{run[0]}-{run[-1]}" for run in passed.split()) + "]"


PARTS = {  # <NAME> in a pattern stands for the part NAME
    "L": character_class(str.isalpha),
    "D": character_class(str.isdecimal),
    "CHAR": rf"(?:<L>|[{MARKS}]|&[aeiouAEIOU](?i:acute|grave|uml);)",
    "CD": "(?:<CHAR>|<D>)",
    "LD": "(?:<L>|<D>)",
    "S": "[ \t\xa0\u2000-\u200a\u3000]",
    "SN": "[ \t\xa0\u2000-\u200a\u3000\n]",
    "APOS": "(?:['\x92\u2019]|(?i:&apos;))",
    "TICK": "(?:['\x92\u2019`\x91\u2018\u201b]|(?i:&apos;))",
    "WORD": r"<CHAR><CD>*(?:[.!?]<CHAR><CD>*)*",
    "AUX": "<APOS>(?:[msdMSD]|(?i:re|ve|ll))",
    "NOT": "(?i:n)<TICK>(?i:t)",
    "ACRONYM": r"(?i:u\.s\.-u\.k|u\.s\.-u\.s\.s\.r|(?:canada|sino|korean|eu|japan|non)-u\.s)|[A-Za-z](?:\.[A-Za-z])+",
    "ABBR": rf"(?:(?i:{DATES_FIRMS})|{CAPITALISED})\.",
    "TITLE": rf"(?:<ACRONYM>|[A-Za-z]|(?i:{TITLES}))",
    "NAME": "[A-Za-z][A-Za-z0-9_:.-]*",
    "VALUE": r"""'[^'\n]*'|"[^"\n]*\"""",
    "TAG": r"<(?:[!?][A-Za-z-][^>\n]*|<NAME>(?: +(?:<NAME>|<NAME> *= *<VALUE>))* */?|/<NAME>) *>",
    "NEXT": rf"<SN>+(?:{STARTERS}|<TAG>)<SN>",  # the next sentence begins
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


def plain(token: str) -> str:
    return token


def drop(token: str) -> str:
    return ""


def no_soft_hyphen(token: str) -> str:
    return token.replace("\xad", "")


def hard_space(token: str) -> str:
    """Blanks inside a token become no-break spaces, which str.split() splits at later, as pycocoevalcap does."""
    return token.replace(" ", "\xa0")


def round_brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def phone(token: str) -> str:
    return hard_space(round_brackets(token))


def ampersand(token: str) -> str:
    return re.sub("(?i:&amp;)", "&", token)


def quotes(token: str) -> str:
    """Directed quotes in LaTeX style. The list of punctuation removes these later; others („) and pairs (’”) stay."""
    for chars, latex in (("&apos;|[\x92’›]", "'"), ("[\x91‘‛‹]", "`"), ('["\x94”»]|&quot;', "''"), ("[\x93“«]", "``")):
        token = re.sub(chars, latex, token)
    return token


def symbol(token: str) -> str:
    """Signs with a spelling of their own, and a run of hyphens, which is a dash up to four."""
    spelling = {"¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$", "\x80": "$", "¼": "1/4", "½": "1/2", "¾": "3/4",
                "⅓": "1/3", "⅔": "2/3", "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-",
                "}": "-rcb-", "---": "", "----": "", "&lt;": "<", "&gt;": ">"}
    return spelling.get(token.lower(), token)


RULES = [  # (what becomes of the token, the token[, what must follow it])
    (plain, "(?i:can)", "(?i:not)"), (plain, "(?i:gon|wan)", "(?i:na)"), (plain, "(?i:got)", "(?i:ta)"),
    (plain, "(?i:lem|gim)", "(?i:me)"), (plain, "<APOS>(?i:t)", "(?i:is|was)"),
    # tags, entities
    (hard_space, "<TAG>"), (drop, "&(?i:md|mdash|ndash);|[\x96\x97\u2013-\u2015]"), (ampersand, "(?i:&amp;)"),
    (plain, "&(?i:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);"),
    # words, and words with an apostrophe
    (no_soft_hyphen, "<WORD>", "<AUX>"), (no_soft_hyphen, "[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*", "<NOT>"),
    (no_soft_hyphen, "<WORD>"),
    (plain, "(?i:<APOS>n<APOS>?|(?:dunkin|somethin|ol)<APOS>|<APOS>(?:em|[2-9]0s|till?|cause)|c<APOS>mon|o<APOS>clock"
            r"|cont<APOS>d\.?|nor<APOS>easter|e<APOS>er|s<APOS>mores|ev<APOS>ry|li<APOS>l|nat<APOS>l|d<APOS>ye|o<TICK>o)"),
    (plain, "[lLdDjJ]<APOS>"), (plain, "[A-HJ-XZn]<TICK><L>{2,}"), (plain, "<L>+[aeiouyAEIOUY]<TICK>[aeiouA-Z]<L>*"),
    (plain, "[yY]<APOS>", "<L>"),
    # addresses; ",-_" below is a range, a slip of the original, so a bare domain has neither capitals nor digits
    (plain, r"""(?i:https?)://[^ \t\n\f\r"<>|(){}]+<URLEND>"""),
    (plain, r"""(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+?[a-zA-Z]{2,4}<PATH>"""),  # lazy, as a path goes furthest
    (plain, r"""(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""),
    (plain, r"""(?:[^ \t\n\f\r"`'<>|!(){},-_$]+\.)+(?i:com|net|org|edu)<PATH>?"""),
    (plain, r"""(?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r"<>|(){}\xa0]*@(?:[^ \t\n\f\r"<>|().{}\xa0]+\.)*"""
            r"""[^ \t\n\f\r"<>|().{}\xa0]+(?:(?i:&gt;)|>)?"""),
    (plain, "@[a-zA-Z_][a-zA-Z_0-9]*|#<CHAR>+"), (plain, r"[Cc]\+\+|[CcFf]#"),
    (quotes, "<AUX>|<NOT>", "[^A-Za-z]"),
    # dates, numbers, fractions, years
    (plain, "<D>{1,2}[-/]<D>{1,2}[-/]<D>{2,4}"),
    (no_soft_hyphen, "[-+]?(?:<D>*(?:[.:,\xad\u066b\u066c]<D>+)+|<D>+)"),
    (plain, "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    (hard_space, r"(?:<D>{1,4}[- \xa0])?<D>{1,4}(?:\\?/|\u2044)<D>{1,4}"), (symbol, "[\xbc-\xbe\u2153-\u215e]"),
    (ampersand, "(?i:-[lr][rcs]b-|c[.]d[.]s|pro-|anti-|s(?:&|&amp;)(?:p-500|ls)|cap<APOS>n|c<APOS>est)"),
    (plain, "<APOS>[0-9]{2}", "<SN>"), (no_soft_hyphen, r"<WORD>\.", "<PAUSE>"),
    (phone, r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?"
            r"[0-9]{3,5}"
            r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    (drop, "'", "[A-Za-z][^ \t\n\r\xa0]"),
    # abbreviations: their full stop stays; where it ends a sentence as well it is read again and removed as punctuation
    (plain, "<ABBR>", "<SN>(?:<SN>|[A-Z]|<TAG>)"), (plain, "<ABBR>", r"[\s\S]{2}"), (plain, "<ABBR>"),
    (plain, "[A-Za-z]", r"\.<NEXT>"), (plain, r"<ACRONYM>\.", "<NEXT>"),
    (plain, r"<TITLE>\."), (plain, "<TITLE>", "<SN>"),
    (plain, rf"(?i:{BEFORE_NUMBERS})\.", "<SN>?<D>"), (plain, r"(?i:pp?t[ye]s?|co)\.", "<S>(?i:ltd|lim)"),
    (plain, rf"<CD>+(?:\.<CD>+)*\.(?i:{FILES})", "<SN>|[.?!,]"),
    # compounds
    (plain, r"<HYPHENED>\.", "<PAUSE>"), (plain, "<HYPHENED>"),
    (ampersand, r"<FIRM>\.", "<PAUSE>"), (ampersand, "<FIRM>"), (plain, r"<SIDE>(?:\\?/<SIDE>){1,2}"),
    (no_soft_hyphen, r"<COMPOUND>\.", "<PAUSE>"), (no_soft_hyphen, "<COMPOUND>"),
    # smileys; in the second ".[^x=" begins another slip: it runs to the next "<>]"
    (round_brackets, r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]"),
    (round_brackets, r"[\^x=~<>]\.\[\^[xX]=(?:(?!<>)[^\n])*<>\]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)"
                     r"|\([\^x=~<>']-[\^x=~<>'`]\)"),
    # signs
    (plain, "<<|>>"), (symbol, "[<>]|(?i:&[lg]t;)|-+"), (drop, r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|[\x85\u2026]"),
    (plain, r"@+|_+|#+|[?!]+"), (plain, r"\*+|(?:\\\*){1,3}"),
    (quotes, "[`\u2018-\u201f\x91-\x94\u2039\u203a\xab\xbb]{1,2}|''|<APOS>|\"|(?i:&quot;)"), (quotes, "<AUX>|<NOT>"),
    (plain, r"[A-Z]*\$"), (symbol, r"[\xa2-\xa5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6()\[\]{}]"),
    (plain, f"[{SYMBOLS}]"), (plain, "\n"), (drop, "<S>+|(?i:&nbsp;)"),
]
COMPILED = [(edit, re.compile(expand(f"({token})(?:{''.join(ahead)})"))) for edit, token, *ahead in RULES]
# Nearly all text is words between blanks, which only the rule for words can touch. Whole runs of them are taken in one
# bite, which stops at words that are split in two and at words that may keep their full stop.
SPLIT = "cannot|gonna|gotta|lemme|gimme|wanna"
STOPPED = f"{SPLIT}|[a-z]|{DATES_FIRMS}|{TITLES}|{BEFORE_NUMBERS}|{CAPITALISED}"
WORDS = re.compile(rf"(?:(?!(?i:{SPLIT})[^A-Za-z])[A-Za-z]+(?:,? *\n|,? +)"
                   rf"|(?!(?i:{STOPPED})\.)[A-Za-z]+\.(?: *\n| +(?=[A-Za-z])))+")
REMOVED = {"", "'", "''", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";"}  # "-LRB-" is there too: too late


def ptb_tokenize(texts: list[str]) -> list[str]:
    """Caption tokens joined by blanks, one string per text, as pycocoevalcap's PTBTokenizer gives them. As there the
    list is read as *one* text, a line each: an abbreviation at the end of a line depends on how the next one begins.
    Three differences, where the original loses count of the lines or depends on the end of the file: any other line
    break is a blank, a quoted value in a tag ends with its line, and the last line ends in a line break too."""
    text = "".join(re.sub("[\n\r\x0b\x0c\u2028\u2029]", " ", line) + "\n" for line in texts)
    out, at = [], 0
    while at < len(text):
        if run := WORDS.match(text, at):
            out.append(run[0].replace(",", "").replace(".", "").lower())
            at = run.end()
            continue
        best, change = None, plain
        for edit, rule in COMPILED:
            if (match := rule.match(text, at)) and (best is None or match.end() > best.end()):
                best, change = match, edit
        if best is None:  # a character the tokenizer does not know
            at += 1
            continue
        at = best.end(1)
        if (token := change(best[1]).lower()) not in REMOVED:
            out.append(token)
    return [" ".join(filter(None, line.rstrip().split(" "))) for line in " ".join(out).split("\n")[:-1]]


# ------------------------------------------------------------------------------------------- CIDEr-D

def cider(candidates: list[str], references: list[list[str]], sigma: float = 6.0) -> tuple[float, np.ndarray]:
    """CIDEr-D of N captions against their lists of references → the corpus score, which is the mean, and the N scores;
    1.0 is "100" in papers. Document frequencies are those of the references given, so each score depends on the whole
    set; N = 1 scores 0. The lengths l in the penalty count bigrams, as in pycocoevalcap.
    Raises ValueError if there is no candidate, or a candidate without references."""
    N, refs_of = len(candidates), np.array([len(refs) for refs in references])
    if not N or len(refs_of) != N or not refs_of.all():
        raise ValueError(f"cider needs 1 or more references for each candidate: got {N} candidates and "
                         f"{len(refs_of)} lists of references, {np.sum(refs_of == 0)} of them empty")
    captions = [line.split() for line in ptb_tokenize(candidates) + ptb_tokenize(list(chain(*references)))]
    image = np.concatenate([np.arange(N), np.repeat(np.arange(N), refs_of)])  # of each caption; candidates first
    length = np.array([len(words) for words in captions])
    number: dict[str, int] = {}
    word = np.array([number.setdefault(w, len(number)) for words in captions for w in words], dtype=np.int64)
    caption = np.repeat(np.arange(len(captions)), length)
    left = np.cumsum(length)[caption] - np.arange(len(word))  # words from here to the end of its caption
    gram = np.zeros_like(word)  # the number of the n-gram that starts here
    cosine = np.zeros(len(captions))
    for n in range(1, 5):
        at = np.flatnonzero(left >= n)
        grams, gram[at] = np.unique(gram[at] * len(number) + word[at + n - 1], return_inverse=True)
        G = max(len(grams), 1)
        pair, count = np.unique(caption[at] * G + gram[at], return_counts=True)  # (caption, n-gram) as one number
        cap, g = np.divmod(pair, G)
        of_image, is_ref = image[cap] * G + g, cap >= N
        df = np.bincount(np.unique(of_image[is_ref]) % G, minlength=G)
        weight = count * (np.log(N) - np.log(np.maximum(1, df[g])))
        norm = np.sqrt(np.bincount(cap, weight ** 2, minlength=len(captions)))
        theirs, weights = np.append(pair[~is_ref], -1), np.append(weight[~is_ref], 0.0)  # candidate i is caption i
        slot = np.searchsorted(theirs[:-1], of_image)
        clipped = np.minimum(np.where(theirs[slot] == of_image, weights[slot], 0.0), weight)
        dot, size = np.bincount(cap, clipped * weight, minlength=len(captions)), norm[image] * norm
        cosine += np.divide(dot, size, out=np.zeros(len(captions)), where=size > 0) / 4
    bigrams = np.maximum(length - 1, 0)
    cosine *= np.exp(-((bigrams[image] - bigrams) ** 2) / (2 * sigma ** 2))
    scores = 10 * np.bincount(image[N:], cosine[N:], minlength=N) / refs_of
    return float(scores.mean()), scores


# ------------------------------------------------------------------------------------------- CHAIR
# Objects are mentioned by words or pairs of words of a synonym list, one object a line: "node, synonym, synonym, ...".

ALIKE = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
PAIRS = {pair: pair for pair in (  # read as one word, so that a "hot dog" is no dog and "home plate" no plate
    "air plane,motor bike,motor cycle,train track,traffic light,traffic signal,street light,stop light,stop sign,"
    "fire hydrant,parking meter,suit case,sports ball,baseball bat,baseball glove,home plate,tennis racket,"
    "wine glass,hot dog,cell phone,mobile phone,laptop computer,teddy bear,hair drier,potted plant").split(",")}
PAIRS |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ALIKE}  # this baby is no person,
PAIRS |= {"passenger jet": "jet", "passenger train": "train"}                          # nor is this passenger,
PAIRS |= {"bow tie": "tie", "toilet seat": "toilet", "sport ball": "sports ball"}      # and this seat no chair
IRREGULAR = {"people": "person", "children": "child", "men": "man", "mice": "mouse", "geese": "goose", "oxen": "ox"}
ENDINGS = [("s", ""), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("buses", "bus"), ("oes", "o"),
           ("ies", "y"), ("ves", "f"), ("ves", "fe")]


def read_synonyms(text: str) -> dict[str, str]:
    """The synonym list → {word or pair of words: its node, which is the first of its line}; of two lines the later.
    Raises ValueError if there is no line."""
    lines = [[word.strip() for word in line.split(",") if word.strip()] for line in text.splitlines()]
    nodes = {word: line[0] for line in lines if line for word in line}
    if not nodes:
        raise ValueError("expected lines of the form 'node, synonym, synonym', found none")
    return nodes


def singular(word: str, known: set[str] | dict) -> str:
    """The singular of a word in lower case if it is one of the `known` words, else the word as it is: that is all that
    CHAIR needs of a singulariser."""
    if word in known or len(word) < 3:
        return word
    for plural, one in IRREGULAR.items():
        if word.endswith(plural) and word[:-len(plural)] + one in known:
            return word[:-len(plural)] + one
    return next((word[:-len(end)] + one for end, one in ENDINGS if word.endswith(end) and word[:-len(end)] + one in known),
                word)


def caption_objects(caption: str, nodes: dict[str, str]) -> list[str]:
    """The nodes that a caption mentions, in its order, repeats included. nodes: as `read_synonyms` gives them."""
    known = nodes.keys() | {word for pair in PAIRS for word in pair.split()}
    words = re.findall(r"[^\W_]+(?:[-/.][^\W_]+)*|[^\w\s]", re.sub("['\u2019]", " ", caption.lower()))  # man's: man, s
    words, merged, at = [singular(word, known) for word in words], [], 0
    while at < len(words):
        pair = " ".join(words[at:at + 2])
        merged.append(PAIRS.get(pair, words[at]))
        at += 2 if pair in PAIRS else 1
    if "toilet" in merged:
        merged = [word for word in merged if word != "seat"]
    return [nodes[word] for word in merged if word in nodes]


def chair(captions: list[str], truths: list[set[str]], nodes: dict[str, str]) -> dict[str, float]:
    """CHAIRs, CHAIRi and recall in [0, 1] of captions against the nodes that are in their pictures: those of the
    instance annotations and of the reference captions. CHAIRi without any mention, and recall without any truth, are 0.
    Raises ValueError if there is no caption, or not one truth a caption."""
    if not captions or len(captions) != len(truths):
        raise ValueError(f"chair needs 1 set of objects for each caption: got {len(captions)} captions, {len(truths)} sets")
    mentioned = [caption_objects(caption, nodes) for caption in captions]
    invented = [sum(node not in truth for node in found) for found, truth in zip(mentioned, truths, strict=True)]
    hits = sum(len(truth & set(found)) for found, truth in zip(mentioned, truths, strict=True))
    return {"chair_s": sum(map(bool, invented)) / len(captions),
            "chair_i": sum(invented) / max(1, sum(map(len, mentioned))),
            "recall": hits / max(1, sum(map(len, truths)))}
