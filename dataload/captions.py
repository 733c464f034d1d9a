"""Captions from the txt and json files of a sample."""

from __future__ import annotations

import json


def txt_captions(data: bytes) -> list[str]:
    """The caption of a KEY.txt: all of it, or none where it is blank. Bytes that are not UTF-8 become
    U+FFFD."""
    text = data.decode("utf-8", "replace").strip().removeprefix("\ufeff")
    return [text] if text else []


def json_object(data: bytes) -> dict[str, object]:
    """A KEY.json. Raises ValueError where it is no JSON object."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}, not an object")
    return content


def json_captions(data: bytes) -> list[str]:
    """The captions of a KEY.json: "captions" (a list of strings), then "caption" (a string) if it is new.

    Blank ones do not count; one that is in the list twice is a caption twice, as people may have written it.
    Half a surrogate pair, which only JSON can spell, becomes "?". Raises ValueError where it is no JSON
    object, or where these have another type (null is none).
    """
    content = json_object(data)
    many, one = content.get("captions"), content.get("caption")
    if many is not None and not (isinstance(many, list) and all(isinstance(text, str) for text in many)):
        raise ValueError('"captions" is not a list of strings')
    if one is not None and not isinstance(one, str):
        raise ValueError('"caption" is not a string')
    texts = [_clean(text) for text in many or []]
    if one is not None and _clean(one) not in texts:
        texts.append(_clean(one))
    return [text for text in texts if text]


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode().strip()
