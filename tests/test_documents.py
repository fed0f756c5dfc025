"""What the documents name is there: files, links, flags, commands, make's targets; and the README's Python runs."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

import ffkernels as ff
from ffkernels import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
MADE = {"build/gpu/run.json", "run.json", "run.md"}  # written by what the document speaks of
FOREIGN = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--no-deps"}
ENDINGS = r"py|md|h|cpp|cu|cuh|png|jsonl?|toml|txt|ini"

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(text, language):
    """Code between fences of ``language``; of "" the indented lines, continued ones joined."""
    if language:
        return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).replace("\\\n", " "), re.M)
    # what a command does stands two spaces or more behind it
    return [re.split(r"\s{2,}(?!-)|\s#", re.sub(r"\s{2,}(?=-)", " ", line.strip()))[0] for line in indented]


def inline(text):
    """What stands between single backticks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text)]


def exists(path):
    """Whether a file or folder has this path from the root or from a folder below it; * stands for any letters."""
    name = path.rstrip("/").rpartition("/")[2]
    folders = [ROOT, *(ROOT / top for top in ("ffkernels", "csrc", "tests", "docs", "bench", "examples", ".ci"))]
    found = (p for folder in folders for p in (folder.glob(name) if folder == ROOT else folder.rglob(name)))
    return any(p.match(path) and (p.is_dir() if path.endswith("/") else p.is_file()) for p in found)


def option_names():
    """All options of the package's commands, scripts and benchmarks, as their sources write them."""
    sources = [p for top in ("ffkernels", "bench", "examples", "tests") for p in (ROOT / top).rglob("*.py")]
    return {flag for p in sources for flag in re.findall(r'"(--[a-z][a-z-]*)"', p.read_text())}


@each_document
def test_files_and_links_are_there(document):
    text = document.read_text()
    paths = [c for c in inline(text) if re.fullmatch(rf"[\w./*-]+\.({ENDINGS})|[\w.][\w./-]*/", c)]
    assert [p for p in paths if p not in MADE and not exists(p)] == []
    prose = re.sub(r"^```.*?^```|^ {4}.*?$|`[^`]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", prose) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@each_document
def test_flags_variables_and_names_are_there(document):
    text = document.read_text()
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join([*inline(text), *blocks(text, "")])))
    assert flags - option_names() - FOREIGN == set()
    sources = "".join(p.read_text() for top in ("ffkernels", "csrc", "tests") for p in (ROOT / top).rglob("*.[pch]*"))
    variables = set(re.findall(r"FFKERNELS_[A-Z_]+", text))
    assert {v for v in variables if v not in sources + (ROOT / "setup.py").read_text()} == set()
    assert [name for name in re.findall(r"\bff\.(\w+)", text) if not hasattr(ff, name)] == []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for code in [*inline(text), *blocks(text, "")] for word in re.findall(r"^make ([a-z]+)", code)}
    assert asked <= targets


@each_document
def test_command_lines_are_accepted(document):
    text = document.read_text()
    for line in blocks(text, ""):
        if given := re.search(r"(?:-m ffkernels|make) ((?:train|bench|predict|info)\b.*)", line):
            command, _, arguments = given[1].partition(" ")
            words = shlex.split(arguments)
            if line.startswith("make"):
                words = [w for word in words for w in shlex.split(word.removeprefix("ARGS="))]
            errors = io.StringIO()
            try:
                with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
                    cli.build_parser().parse_args([command, *words])
            except SystemExit as end:
                if end.code != 0:
                    pytest.fail(f"{document.name}: {line}: {errors.getvalue()}")


def test_the_readme_runs():
    """Its blocks of Python one after the other, as they stand, on few inputs."""
    labels = torch.arange(20) % 10
    images = torch.rand(20, 784)
    given = {
        "torch": torch,
        "nn": torch.nn,
        "images": images,
        "labels": labels,
        "test_images": images[:7],
        "x_pos": ff.overlay(images, labels, num_classes=10),
        "x_neg": ff.overlay(images, (labels + 1) % 10, num_classes=10),
        "x": torch.rand(6, 30),
        "sign": torch.tensor([1.0, -1.0] * 3),
        "weight": torch.randn(5, 30),
        "bias": torch.zeros(5),
    }
    parts = blocks((ROOT / "README.md").read_text(), "python")
    for part in parts:
        exec(compile(part, "README.md", "exec"), given)
    usual, fused = given["Layer"](784, 500), ff.FFLinear(784, 500)
    fused.load_state_dict(usual.state_dict(), strict=False)
    usual.step(given["x_pos"], given["x_neg"])
    fused.step(given["x_pos"], given["x_neg"])
    assert torch.allclose(usual.weight, fused.weight, atol=1e-5)  # "before" and "after" are the same step
    assert given["predicted"].shape == (7,)
    assert given["net"].head is not None
    assert (given["net"].stack[0].weight == 0).any()  # outside the receptive fields


def test_every_picture_is_shown_by_a_document():
    shown = {
        (document.parent / link).resolve()
        for document in DOCUMENTS
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", document.read_text())
    }
    assert {path for path in ROOT.glob("docs/*.png") if path not in shown} == set()
