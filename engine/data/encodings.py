"""The text encoding of a file: chosen, given by a byte order mark, proved, or detected and then proved on the whole
file.

UTF-8 and Unicode encodings with a byte order mark need no guess. For others, chardet proposes an encoding from the
bytes, which is accepted only if the whole file can be decoded with it; its confidence is shown, and a person can
choose. Whatever the encoding, readers get UTF-8 from `open_utf8`. A byte that cannot be decoded arrives as an invalid
one (0xFF), so that its row can be reported and the others are still read.
"""

from __future__ import annotations

import codecs
import difflib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from engine.core.problems import Refusal, problem

BUFFER_BYTES = 1 << 20  # bytes read at a time
SAMPLE_BYTES = 1 << 16  # bytes of lines with non-ASCII characters, from which an encoding is detected
# Confidence limits, chosen on short texts in nine languages, 10 to 500 characters: see docs/data.md.
SURE_CONFIDENCE, SURE_MARGIN, SURE_BYTES = 0.3, 0.15, 3
MIN_CONFIDENCE = 0.005  # below this, the bytes are not text that chardet knows
MAX_DAMAGED_UTF8_SHARE = 0.2  # of the characters; text that is four fifths UTF-8 is hardly ever in another encoding
MAX_DAMAGED_SHARE = 0.05  # of the non-ASCII characters; if more are undecodable, the file is in another encoding

# Name in dataset_info.json → common name, codec. The wider codec stands for those within it.
ENCODINGS: dict[str, tuple[str, str]] = {
    "utf-8": ("UTF-8", "utf-8"), "utf-16": ("UTF-16", "utf-16"), "utf-16-le": ("UTF-16 LE", "utf-16-le"),
    "utf-16-be": ("UTF-16 BE", "utf-16-be"), "utf-32": ("UTF-32", "utf-32"), "utf-32-le": ("UTF-32 LE", "utf-32-le"),
    "utf-32-be": ("UTF-32 BE", "utf-32-be"), "gb18030": ("GB18030", "gb18030"), "big5": ("Big5", "big5hkscs"),
    "shift_jis": ("Shift-JIS", "cp932"), "euc_jp": ("EUC-JP", "euc_jp"), "iso-2022-jp": ("ISO-2022-JP", "iso2022_jp"),
    "euc_kr": ("EUC-KR", "cp949"), "windows-1252": ("Windows-1252", "cp1252"), "latin-1": ("Latin-1", "latin-1"),
    "iso-8859-15": ("ISO-8859-15", "iso8859-15"), "windows-1250": ("Windows-1250", "cp1250"),
    "iso-8859-2": ("ISO-8859-2", "iso8859-2"), "windows-1251": ("Windows-1251", "cp1251"),
    "koi8-r": ("KOI8-R", "koi8-r"), "koi8-u": ("KOI8-U", "koi8-u"), "windows-1253": ("Windows-1253", "cp1253"),
    "windows-1254": ("Windows-1254", "cp1254"), "windows-1255": ("Windows-1255", "cp1255"),
    "windows-1256": ("Windows-1256", "cp1256"), "windows-1257": ("Windows-1257", "cp1257"),
    "windows-1258": ("Windows-1258", "cp1258"), "windows-874": ("Windows-874", "cp874"),
    "mac-roman": ("Mac Roman", "mac-roman"), "cp437": ("CP437", "cp437"), "cp850": ("CP850", "cp850"),
    "cp866": ("CP866", "cp866"),
}  # fmt: skip
WIDER_CODECS = {  # codec → the wider codec that stands for it
    "gbk": "gb18030", "gb2312": "gb18030", "hz": "gb18030", "big5": "big5hkscs", "cp950": "big5hkscs",
    "shift_jis": "cp932", "euc_kr": "cp949", "johab": "cp949", "ascii": "utf-8", "utf-8-sig": "utf-8",
    "euc_jis_2004": "euc_jp", "euc_jisx0213": "euc_jp", "shift_jis_2004": "cp932",
}  # fmt: skip
# Encodings that chardet may propose. Others are so rare in training data that proposing them would mislead; they can be
# chosen.
DETECTABLE_CODECS = (
    "gb18030",
    "big5hkscs",
    "cp932",
    "euc_jis_2004",
    "cp949",
    "cp1252",
    "cp1251",
    "koi8-r",
    "cp1250",
)
DETECTABLE_LABELS = (
    "UTF-8, UTF-16, GB18030, Big5, Shift-JIS, EUC-JP, EUC-KR, Windows-1250, 1251, 1252, KOI8-R"  # of what is detected
)
ASCII_RUN = re.compile(r"[\x00-\x7f]+")
MIN_BYTE_PAIR_RUNS = 8  # runs of non-ASCII bytes, all of even length, which single-byte encodings do not have by chance
SINGLE_BYTE_CODECS = ("cp1252", "cp1251", "koi8-r", "cp1250")
NON_ASCII_BYTES = re.compile(rb"[\x80-\xff]+")
UNDECODABLE_MARK = re.compile("[\udc80-\udcff]")  # replaces an undecodable byte in a text


@dataclass(frozen=True)
class Encoding:
    """How a file is read. `name` is a key of ENCODINGS, `codec` Python's name.

    `detected`: it was inferred from the bytes, with `confidence` from 0 to 1; `sure`: clearly enough that nobody has to
    be asked. `others`: names of alternatives, the most likely first. `damaged`: it may contain bytes that do not belong
    to it.
    """

    name: str
    codec: str
    detected: bool = False
    confidence: float = 1.0
    sure: bool = True
    others: tuple[str, ...] = ()
    damaged: bool = False

    @property
    def label(self) -> str:
        return ENCODINGS[self.name][0]


def encoding_key(name: str) -> str:
    """The key of ENCODINGS that a person means by `name`. Raises Refusal, with the most similar name, for an unknown
    one."""
    try:
        codec = codecs.lookup(name.strip()).name
    except (LookupError, ValueError):
        codec = ""
    codec = WIDER_CODECS.get(codec, codec)
    for key, (_, encoding_codec) in ENCODINGS.items():
        if codec and codecs.lookup(encoding_codec).name == codec:
            return key
    near = difflib.get_close_matches(name.casefold().strip(), [*ENCODINGS, "gbk", "cp1252"], 1, 0.5)
    code = "encoding-did-you-mean" if near else "encoding-unknown"
    raise Refusal(problem(code, encoding=name[:40], nearest="".join(near), known=", ".join(ENCODINGS)))


def version(file: Path) -> tuple[int, int]:
    """A value that changes when the file does."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def encoding_of(file: Path, chosen: str = "") -> Encoding:
    """The encoding of a file; `chosen` is a person's choice. Cached until the file changes.

    Raises Refusal if the file cannot be decoded, or not as chosen.
    """
    return _encoding(file, chosen, *version(file))


@lru_cache(maxsize=1024)
def _encoding(file: Path, chosen: str, mtime_ns: int, size: int) -> Encoding:
    with file.open("rb") as stream:
        start = stream.read(4096)
    if chosen:
        return _as_specified(file, encoding_key(chosen), start)
    if marked := _detect_by_byte_order_mark(start) or _detect_by_zero_bytes(start):
        return marked
    failed_at = _first_undecodable(file, "utf-8")
    if failed_at is None:
        if b"\x1b$" in start and _first_undecodable(file, "iso2022_jp") is None:
            return Encoding("iso-2022-jp", "iso2022_jp", detected=True)
        sig = start.startswith(codecs.BOM_UTF8)
        return Encoding("utf-8", "utf-8-sig" if sig else "utf-8")
    return _detect_by_content(file, start, failed_at)


def _as_specified(file: Path, name: str, start: bytes) -> Encoding:
    codec = ENCODINGS[name][1]
    if name == "utf-8" and start.startswith(codecs.BOM_UTF8):
        codec = "utf-8-sig"
    good, bad, line = _count_damage(file, codec)
    if bad > MAX_DAMAGED_SHARE * (good + bad):
        raise Refusal(problem("file-encoding-chosen", file=file.name, encoding=ENCODINGS[name][0], line=line))
    return Encoding(name, codec, damaged=bad > 0)


def _detect_by_byte_order_mark(start: bytes) -> Encoding | None:
    """By the byte order mark. The little-endian mark of UTF-32 begins with that of UTF-16."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if start.startswith(mark):
            return Encoding(name, name, damaged=True)  # accepted here, and checked when rows are read
    return None


def _detect_by_zero_bytes(start: bytes) -> Encoding | None:
    """Without a byte order mark, UTF-16 and UTF-32 are recognized by the zero bytes of Latin letters, digits and
    brackets."""
    zeros = [start[place::4].count(0) * 4 for place in range(4)]
    full = len(start) * 0.99 - 4  # the last character may be cut in two
    for name, high, low in (("utf-32-le", (2, 3), 0), ("utf-32-be", (0, 1), 3)):
        if len(start) >= 8 and zeros[high[0]] >= full and zeros[high[1]] >= full / 2 and zeros[low] * 4 < full:
            return Encoding(name, name, detected=True, damaged=True)
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if max(even, odd) * 2 > len(start) and min(even, odd) * 4 < max(even, odd):
        name = "utf-16-be" if even > odd else "utf-16-le"
        return Encoding(name, name, detected=True, damaged=True)
    return None


def _detect_by_content(file: Path, start: bytes, failed_at: tuple[int, int]) -> Encoding:
    """The first of chardet's proposals for the non-ASCII lines that decodes the whole file."""
    size, line = file.stat().st_size, failed_at[1]
    good, bad, _ = _count_damage_in(_sample_lines(file), "utf-8")
    # Text that is almost all UTF-8, or is UTF-8 up to a last character that was cut in two, is damaged UTF-8: in
    # another encoding every character of it would be wrong.
    if good and (bad <= MAX_DAMAGED_UTF8_SHARE * (good + bad) or failed_at[0] >= size - 3):
        sig = start.startswith(codecs.BOM_UTF8)
        return Encoding("utf-8", "utf-8-sig" if sig else "utf-8", damaged=True)
    sample = b"".join(_sample_lines(file))
    proposed = _proposals(sample)
    sure = sum(map(len, NON_ASCII_BYTES.findall(sample))) >= SURE_BYTES
    for place, (name, confidence) in enumerate(proposed):
        codec = ENCODINGS[name][1]
        if _first_undecodable(file, codec) is not None:
            good, bad, _ = _count_damage(file, codec)
            if bad > MAX_DAMAGED_SHARE * (good + bad):
                continue
        possible = dict.fromkeys(map(encoding_key, DETECTABLE_CODECS), 0.0) | dict(proposed)
        differing = [
            (other, trust)
            for other, trust in sorted(possible.items(), key=lambda candidate: -candidate[1])
            if other != name and _decode_or_none(sample, other) not in (None, _decode_or_none(sample, name))
        ]
        rival = max((trust for _, trust in differing), default=0.0)
        return Encoding(
            name,
            codec,
            True,
            confidence,
            sure and place == 0 and _is_certain(confidence, rival),
            tuple(n for n, _ in differing),
            damaged=_first_undecodable(file, codec) is not None,
        )
    raise Refusal(problem("file-encoding", file=file.name, line=line, known=DETECTABLE_LABELS))


def _is_certain(confidence: float, rival: float) -> bool:
    return confidence >= SURE_CONFIDENCE or confidence - rival >= SURE_MARGIN


def _proposals(sample: bytes) -> list[tuple[str, float]]:
    """Names of possible encodings with confidence, the most likely first."""
    import chardet  # slow to import, and few files need it

    proposed = chardet.detect_all(
        sample,
        ignore_threshold=True,
        max_bytes=SAMPLE_BYTES,
        include_encodings=DETECTABLE_CODECS,
        compat_names=False,
    )
    confidences = {
        encoding_key(candidate["encoding"]): float(candidate["confidence"])
        for candidate in proposed
        if candidate["encoding"]
    }
    confidences = {name: confidence for name, confidence in confidences.items() if ENCODINGS[name][1] != "utf-8"}
    runs = NON_ASCII_BYTES.findall(sample)
    pairs = len(runs) >= MIN_BYTE_PAIR_RUNS and all(len(run) % 2 == 0 for run in runs)
    if pairs and not _is_certain(*[*confidences.values(), 0.0, 0.0][:2]):
        # Non-ASCII letters do not always come in pairs in a Western or Cyrillic text, while Chinese, Japanese and
        # Korean characters are pairs of bytes. A text with few different ones tells a detector nothing more.
        confidences = {encoding_key(name): 0.0 for name in DETECTABLE_CODECS} | confidences
        return sorted(
            confidences.items(),
            key=lambda candidate: (ENCODINGS[candidate[0]][1] in SINGLE_BYTE_CODECS, -candidate[1]),
        )
    return [(name, confidence) for name, confidence in confidences.items() if confidence > MIN_CONFIDENCE]


def _decode_or_none(sample: bytes, name: str) -> str | None:
    try:
        return sample.decode(ENCODINGS[name][1])
    except UnicodeDecodeError:
        return None


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BUFFER_BYTES):
            yield block


def has_zeros(file: Path) -> bool:
    """Whether a file contains a zero byte: checked once, so that not every line of a large table has to be checked."""
    return _has_zeros(file, *version(file))


@lru_cache(maxsize=1024)
def _has_zeros(file: Path, mtime_ns: int, size: int) -> bool:
    return any(b"\0" in block for block in _blocks(file))


def _first_undecodable(file: Path, codec: str) -> tuple[int, int] | None:
    """Byte and line, from 1, of the first place that this codec cannot decode; None if there is none."""
    decoder = codecs.getincrementaldecoder(codec)()
    line, at = 1, 0
    try:
        for block in _blocks(file):
            decoder.decode(block)
            line, at = line + block.count(b"\n"), at + len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The error's position includes what was left over from the previous block.
        return at + error.start, line + error.object[: error.start].count(b"\n")
    return None


def _sample_lines(file: Path) -> list[bytes]:
    """Lines with non-ASCII bytes, up to SAMPLE_BYTES of them."""
    lines: list[bytes] = []
    left, held = SAMPLE_BYTES, b""
    for block in _blocks(file):
        *whole, held = (held + block).split(b"\n")
        for line in whole:
            if left > 0 and not line.isascii():
                lines.append(line[:left] + b"\n")
                left -= len(line)
        if left <= 0:
            return lines
        if len(held) > SAMPLE_BYTES:  # a line that never ends
            lines.append(held[:left])
            return lines
    return [*lines, held[:left]] if not held.isascii() else lines


def _count_damage(file: Path, codec: str) -> tuple[int, int, int]:
    return _count_damage_in(_blocks(file), codec)


def _count_damage_in(blocks: Iterator[bytes] | list[bytes], codec: str) -> tuple[int, int, int]:
    """The number of non-ASCII characters, the number of undecodable places, and the line of the first of these."""
    decoder = codecs.getincrementaldecoder(codec)("no character")
    good = bad = 0
    line, first = 1, 0
    for block in (*blocks, b"") if isinstance(blocks, list) else _with_final_block(blocks):
        text = decoder.decode(block, final=not block)
        if not text.isascii():
            missing = len(UNDECODABLE_MARK.findall(text))
            if missing and not first and (mark := UNDECODABLE_MARK.search(text)):
                first = line + text.count("\n", 0, mark.start())
            bad += missing
            good += len(text) - missing - sum(map(len, ASCII_RUN.findall(text)))
        line += text.count("\n")
    return good, bad, first or 1


def _with_final_block(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _replace_undecodable(error: UnicodeError) -> tuple[str, int]:
    """An error handler for decoding: one mark for each undecodable piece."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff", max(error.end, error.start + 1)


codecs.register_error("no character", _replace_undecodable)


class _Utf8Stream(io.RawIOBase):
    """The bytes that a file would have if it were UTF-8."""

    def __init__(self, file: Path, codec: str):
        self.source, self.ready = file.open("rb"), memoryview(b"")
        self.decoder = codecs.getincrementaldecoder(codec)("no character")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.ready:
            block = self.source.read(BUFFER_BYTES)
            text = self.decoder.decode(block, final=not block)
            self.ready = memoryview(text.encode(errors="surrogateescape"))
            if not block:
                break
        size = min(len(into), len(self.ready))
        into[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.source.close()
        super().close()


def open_utf8(file: Path, at: int = 0, encoding: str = "") -> BinaryIO:
    """The text of a file as UTF-8 without a byte order mark, whatever its encoding, from byte `at` on.

    Raises Refusal if its encoding is unknown. `at` counts from the start of the file, including a byte order mark.
    """
    codec = encoding_of(file, encoding).codec
    if codec.startswith("utf-8"):
        stream: BinaryIO = file.open("rb")
        stream.seek(at or len(codecs.BOM_UTF8) * (codec == "utf-8-sig"))
        return stream
    stream = io.BufferedReader(_Utf8Stream(file, codec), BUFFER_BYTES)
    while at > 0:  # text in another encoding can only be reached by reading up to there
        at -= len(stream.read(min(at, BUFFER_BYTES)) or b" " * at)
    return stream


def read_text(file: Path) -> str:
    """All of a small file. Raises Refusal if its encoding is unknown, or a part of it cannot be decoded."""
    with open_utf8(file) as stream:
        content = stream.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise Refusal(problem("file-encoding", file=file.name, line=line, known=DETECTABLE_LABELS)) from None
