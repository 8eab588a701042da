"""Real text that every Python machine has: the standard library's docstrings as a classification task.

An example is the prose of one docstring; its label is the chapter of the Python Library Reference that documents the
module it comes from. The table from module to chapter below is ours. Sources are parsed, not imported; a few modules
written in C are imported, since their docstrings exist nowhere else.

What is done to a docstring: doctests and what follows them, signatures and field lists go; the first paragraphs that
make up at most ``MAX_WORDS`` words stay; the name of its own module becomes the word "module", so that the label has to
be read off the meaning; texts under ``MIN_WORDS`` words and repeated texts go; no module gives more than
``MAX_PER_MODULE`` and no chapter more than ``MAX_PER_CHAPTER`` examples. The same Python installation and seed give the
same corpus; another Python version gives a slightly different one, because its library is.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

MIN_WORDS = 5
MAX_WORDS = 60
MAX_PER_MODULE = 100
MAX_PER_CHAPTER = 240

CHAPTERS: dict[str, str] = {
    "Data Types": "datetime zoneinfo calendar collections heapq bisect array weakref types copy pprint enum graphlib",
    "Numeric and Mathematical Modules": "numbers math cmath decimal fractions random statistics",
    "File and Directory Access": (
        "pathlib fileinput stat filecmp tempfile glob fnmatch linecache shutil posixpath ntpath"
    ),
    "Data Compression and Archiving": "zlib gzip bz2 lzma zipfile tarfile",
    "Generic Operating System Services": "os io time logging platform ctypes argparse optparse getpass getopt curses",
    "Concurrent Execution": "threading multiprocessing concurrent subprocess sched queue contextvars",
    "Networking and Interprocess Communication": "asyncio socket ssl select selectors signal mmap",
    "Internet Data Handling": "email json mailbox mimetypes base64 binascii quopri",
    "Structured Markup Processing Tools": "html xml",
    "Internet Protocols and Support": (
        "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib uuid socketserver xmlrpc ipaddress"
    ),
    "Development Tools": "typing pydoc doctest unittest",
    "Python Runtime Services": (
        "sys sysconfig warnings dataclasses contextlib abc atexit traceback gc inspect site codeop code"
    ),
    "Importing Modules": "zipimport pkgutil modulefinder runpy importlib",
    "Python Language Services": "ast symtable tokenize pyclbr compileall dis pickletools",
}
"""Chapter of the Library Reference -> its modules, separated by spaces."""

# Where a module's Python source has another name than the module (which one exists depends on the Python version).
_SOURCES = {
    "collections": ("collections", "_collections_abc"),
    "datetime": ("datetime", "_pydatetime"),
    "decimal": ("decimal", "_pydecimal"),
    "io": ("io", "_pyio"),
    "posixpath": ("posixpath", "genericpath"),
    "weakref": ("weakref", "_weakrefset"),
}
_WRITTEN_IN_C = (
    "array", "binascii", "bz2", "cmath", "collections", "contextvars", "datetime", "gc", "lzma", "math", "mmap", "os",
    "select", "signal", "socket", "sys", "time", "zlib",
)  # fmt: skip
_HOMES = {"os": ("posix", "nt"), "lzma": ("_lzma",), "signal": ("_signal",)}
_SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)?.*(->|--|$)")
_FIELD = re.compile(r"^(:\w+|@\w+|Args?:|Arguments?:|Parameters?:|Returns?:|Raises?:|[-=~*+]{3,})")


@dataclass(frozen=True)
class Corpus:
    """A text classification task.

    Attributes:
        train: pairs of text and label number.
        validation: pairs to choose settings on.
        test: pairs nobody looked at while choosing.
        label_names: chapter names; a label number is an index into them.
    """

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]
    label_names: list[str]


def docstring_corpus(seed: int = 0) -> Corpus:
    """Build the corpus: 70 % training, 10 % validation, 20 % test, shuffled by ``random.Random(seed)``."""
    generator = random.Random(seed)
    label_names = sorted(CHAPTERS)
    seen: set[str] = set()
    examples: list[tuple[str, int]] = []
    for label, chapter in enumerate(label_names):
        texts: list[str] = []
        for module in CHAPTERS[chapter].split():
            texts += _sample(_texts_of_module(module, seen), MAX_PER_MODULE, generator)
        examples += [(text, label) for text in _sample(texts, MAX_PER_CHAPTER, generator)]
    generator.shuffle(examples)
    cuts = len(examples) * 7 // 10, len(examples) * 8 // 10
    return Corpus(examples[: cuts[0]], examples[cuts[0] : cuts[1]], examples[cuts[1] :], label_names)


def clean_docstring(docstring: str, module: str) -> str:
    """Prose of a docstring on one line, without the name of its module; empty when too little is left."""
    paragraphs: list[str] = []
    words = 0
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if ">>>" in block:
            break
        lines = [line.strip() for line in block.splitlines()]
        prose = " ".join(line for line in lines if line and not _FIELD.match(line) and not _SIGNATURE.match(line))
        prose = re.sub(rf"\b{re.escape(module)}\b", "module", prose, flags=re.IGNORECASE)
        words += len(prose.split())
        if paragraphs and words > MAX_WORDS:
            break
        if prose:
            paragraphs.append(prose)
    kept = " ".join(paragraphs).split()[:MAX_WORDS]
    letters = sum(any(character.isalpha() for character in word) for word in kept)
    return " ".join(kept) if letters >= MIN_WORDS else ""


def _texts_of_module(module: str, seen: set[str]) -> list[str]:
    texts: list[str] = []
    for docstring in [*_source_docstrings(module), *_compiled_docstrings(module)]:
        text = clean_docstring(docstring, module)
        key = re.sub(r"\W+", " ", text).lower()
        if text and key not in seen:
            seen.add(key)
            texts.append(text)
    return texts


def _source_docstrings(module: str) -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in _SOURCES.get(module, (module,)):
        folder = library / name
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
            parts = set(path.relative_to(library).parts)
            if path.is_file() and not parts & {"test", "tests", "__pycache__"}:
                yield from _parsed_docstrings(path.read_bytes())


def _parsed_docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _compiled_docstrings(module: str) -> Iterator[str]:
    if module not in _WRITTEN_IN_C:
        return
    try:
        imported = importlib.import_module(module)
    except ImportError:  # a Python built without this library, such as lzma
        return
    for _, member in sorted(vars(imported).items()):
        if _belongs(member, imported):
            yield from _member_docstrings(member)


def _belongs(member: object, module: ModuleType) -> bool:
    if not (inspect.isroutine(member) or inspect.isclass(member)):
        return False
    name = module.__name__
    return getattr(member, "__module__", None) in (name, f"_{name}", *_HOMES.get(name, ()))


def _member_docstrings(member: object) -> Iterator[str]:
    inner = [value for _, value in sorted(vars(member).items())] if inspect.isclass(member) else []
    for candidate in [member, *(value for value in inner if inspect.isroutine(value))]:
        docstring = getattr(candidate, "__doc__", None)
        if isinstance(docstring, str):
            yield docstring


def _sample(texts: list[str], limit: int, generator: random.Random) -> list[str]:
    if len(texts) <= limit:
        return texts
    return [texts[index] for index in sorted(generator.sample(range(len(texts)), limit))]
