"""Text into sentences, for objectives that pair them. Joined again they are the text, but for space at the joints."""

from __future__ import annotations

import regex

# A full stop ends no sentence after these, nor after a single capital letter.
SHORT = (
    "mr mrs ms dr prof st sr jr vs etc e.g i.e cf fig figs eq eqs sec no vol pp ed eds al inc ltd co corp dept univ "
    "approx jan feb mar apr jun jul aug sep sept oct nov dec bzw z.b d.h usw ca nr art m mme mlle sra"
).split()
_END = regex.compile(
    r"""(?:
        [.!?…]+ ["'”’»)\]]* (?= \s+ ["'“‘«(\[¿¡]* (?: \p{Lu} | \p{N} | \p{Lo} ) )
      | [。！？｡]+ ["'”’」』）]*
      | [؟।॥۔]+ (?= \s | \Z)
      | \n\s*\n
    )""",
    regex.VERBOSE,
)
_LAST = regex.compile(r"[\p{L}.]+$")


def split_sentences(text: str) -> list[str]:
    """Sentences without surrounding white space, in order; empty text has none.

    Full stop, exclamation and question mark before a capital, digit or uncased letter end one, as do the marks of
    Chinese, Japanese, Arabic, Urdu and Hindi, and an empty line.
    """
    found, begin = [], 0
    for match in _END.finditer(text):
        if match.group().startswith(".") and len(match.group()) == 1 and _is_short(text[begin : match.start()]):
            continue
        sentence = text[begin : match.end()].strip()
        begin = match.end()
        if sentence:
            found.append(sentence)
    rest = text[begin:].strip()
    return [*found, rest] if rest else found


def _is_short(before: str) -> bool:
    last = _LAST.search(before[-24:])
    word = last.group().lower() if last else ""
    return word in SHORT or (len(word) == 1 and word.isalpha() and last is not None and last.group().isupper())
