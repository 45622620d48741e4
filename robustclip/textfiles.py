"""Text files, read as UTF-8 on every machine, whatever its locale; a byte order mark is dropped."""

import unicodedata
from pathlib import Path

BYTE_ORDER_MARK = "\ufeff"


def read_text(path: Path) -> str:
    """Reads a text file as UTF-8; all line ends become line feeds.

    Raises:
        ValueError: the file has another encoding.
        OSError: the file cannot be read.
    """
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decodes UTF-8 as `read_text` does.

    Args:
        data: content of a text file.
        name: path or URL of the file, for the message.

    Raises:
        ValueError: the data have another encoding.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02X} at position {error.start}"
        raise ValueError(f"{name} is not UTF-8 ({place}); save it as UTF-8") from error
    return text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def check_printable(text: str, name: str) -> None:
    """Refuses control characters and line separators, which class names and prompts never need.

    Args:
        text: one line.
        name: origin of the line, for the message.

    Raises:
        ValueError: the line has such a character.
    """
    for position, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character == BYTE_ORDER_MARK:
            raise ValueError(
                f"{name} has the control character U+{ord(character):04X} at position {position}: {text[:60]!r}"
            )
