"""What a file is, where it is not what was asked for: by its ending, and by its first bytes."""

from __future__ import annotations

from pathlib import Path

from diag.errors import visible
from diag.inputs.folders import files_below

PROSE = (".txt", ".md", ".markdown", ".rst")
"""Endings of the texts of a folder."""

IMAGES = {b"\xff\xd8\xff": "a JPEG", b"\x89PNG": "a PNG", b"RIFF": "a WebP"}
"""How the images begin that are read, whatever a file is called."""

ENDINGS = {
    **dict.fromkeys((".json", ".ipynb"), "JSON"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines of JSON"),
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather"), "a table"),
    ".parquet": "a Parquet file",
    **dict.fromkeys((".html", ".htm", ".xhtml"), "a web page"),
    **dict.fromkeys((".pdf", ".ps", ".djvu"), "a printed page"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub"), "a document of a word processor"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"), "an archive"),
    **dict.fromkeys((".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".gguf"), "a file of numbers"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "an image"),
    **dict.fromkeys((".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg"), "an image"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"), "a video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg"), "sound"),
    **dict.fromkeys((".yaml", ".yml", ".toml"), "a plan or settings"),
}
"""What is no prose, by its ending: read as such, its brackets and tags would be measured."""

STARTS = {
    b"%PDF-": "a printed page",
    b"{\\rtf": "a document of a word processor",
    b"PK\x03\x04": "an archive",
    b"\x1f\x8b": "an archive",
    b"BZh": "an archive",
    b"\xfd7zXZ": "an archive",
    b"\x28\xb5\x2f\xfd": "an archive",
    b"PAR1": "a Parquet file",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "an image"),
}
"""The same by the first bytes, whatever a file is called."""


def kind_of(file: Path, content: bytes = b"") -> str | None:
    """What a file is that is no prose, in words; None where neither name nor content tells."""
    begun = (kind for start, kind in STARTS.items() if content.startswith(start))
    return ENDINGS.get(file.suffix.lower()) or next(begun, None)


def others(folder: Path) -> str:
    """What lies in a folder that somebody may have taken for what is missing there, as words behind it."""
    found = {Path(name).suffix for name, *_ in files_below(folder, lambda name: bool(Path(name).suffix))[0]}
    said = []
    for suffix in sorted(found)[:3]:
        kind = "texts" if suffix.lower() in PROSE else ENDINGS.get(suffix.lower())
        said.append(f"'{visible(suffix)}'" + (f" ({kind})" if kind else ""))
    return f", only {' and '.join(said)}" if found else ""
