"""The commands that put a trained run to use. Each is thin above `vaekernels.training.use`."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import itertools
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from vaekernels._files import write_atomically
from vaekernels.training import compare as comparison
from vaekernels.training import display, exported, inputs
from vaekernels.training.codec import Codes, Decoded
from vaekernels.training.config import Config
from vaekernels.training.errors import CheckpointError, ConfigError, InputError
from vaekernels.training.run import newest_run
from vaekernels.training.use import TRAVERSED, Run, open_run

__all__ = ["COMMANDS", "Newest", "or_newest"]

_Path = Path | None
_Str = str | None

Newest = Annotated[
    _Path,
    typer.Argument(
        metavar="[RUN]", help="The folder of a run (default: the newest below runs/).", show_default=False
    ),
]
_Named = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Out = Annotated[
    _Path,
    typer.Option(
        help="Write into this file: .npy, .csv, .json or .txt; images also .png.", show_default=False
    ),
]
_Picture = Annotated[_Path, typer.Option(help="The picture, a .png (default: in RUN).", show_default=False)]


def sample(
    run: Newest = None,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 20,
    temperature: Annotated[float, typer.Option(help="Standard deviation of z; the prior's is 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of z.")] = 0,
    as_json: _Json = False,
    out: _Out = None,
) -> None:
    """Decode z drawn from the prior. Prints sentences and vectors; images become RUN/samples.png."""
    opened = _opened(run)
    decoded = opened.sample(n, temperature=temperature, seed=seed)
    if isinstance(decoded, list):
        _say(f"{len(set(decoded))} of {n} sentences are distinct")
    _show(opened, decoded, "samples", as_json, out)


def decode(
    run: _Named,
    codes: Annotated[Path, typer.Argument(help="z: what `encode` wrote, or an array [N, D] (.npy, .csv).")],
    as_json: _Json = False,
    out: _Out = None,
) -> None:
    """What the decoder of RUN makes of codes. Prints sentences and vectors; images become RUN/decoded.png."""
    opened = _opened(run)
    _show(opened, opened.decode(inputs.codes(codes)), "decoded", as_json, out)


def encode(
    run: Newest = None,
    data: Annotated[
        _Str,
        typer.Option(
            metavar="PATH",
            help="A text file, images, or an .npy, .npz or .csv (default: the held-out data of RUN).",
            show_default=False,
        ),
    ] = None,
    as_json: _Json = False,
    out: Annotated[_Path, typer.Option(help="codes.npy or codes.csv.", show_default=False)] = None,
) -> None:
    """Codes of examples: mu, logvar and rate of every dimension. Prints their means."""
    if out is not None and out.suffix not in (".npy", ".csv"):
        raise InputError(f"--out must end in .npy or .csv, got {out}")
    opened = _opened(run)
    if data is None:
        opened.require_examples()
    codes = opened.encode(
        opened.data.heldout if data is None else inputs.examples(opened.data, data, opened.config.data.size)
    )
    if out is not None:
        _write(out, _codes_file(codes, out.suffix))
    if as_json:
        print(
            json.dumps(
                {"mu": codes.mu.tolist(), "logvar": codes.logvar.tolist(), "rate": codes.rate.tolist()}
            )
        )
        return
    print(f"{len(codes.mu)} examples; means over them, rate in nats")
    print(f"{'dim':>5} {'rate':>9} {'mu':>9} {'Var(mu)':>9} {'logvar':>9}")
    for dim in range(codes.mu.shape[1]):
        mu = codes.mu[:, dim].double()
        means = (codes.rate[:, dim].mean(), mu.mean(), mu.var(correction=0), codes.logvar[:, dim].mean())
        print(f"{dim:>5} " + " ".join(f"{mean.item():>9.3f}" for mean in means))
    if out is not None:
        print(f"codes: {out}")


def interpolate(
    run: _Named,
    a: Annotated[
        str, typer.Argument(metavar="A", help="A sentence, an image file, or heldout:0, number 0 held out.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other end.")],
    steps: Annotated[int, typer.Option(help="Codes on the line, the ends included.")] = 7,
    as_json: _Json = False,
    out: _Picture = None,
) -> None:
    """Decode the codes on the line from A to B: sentences, or a picture."""
    opened = _opened(run)
    ends = [inputs.example(opened.data, each, opened.config.data.size) for each in (a, b)]
    for given in (a, b):
        if not given.startswith(inputs.HELD_OUT) and (unknown := opened.unknown(given)):
            _say(f"not in the vocabulary: {', '.join(unknown)}")
    line = opened.interpolate(*ends, steps=steps)
    if isinstance(line, list):
        changes = sum(one != other for one, other in itertools.pairwise(line))
        _say(f"the sentence changes at {changes} of {steps - 1} steps")
    if as_json or isinstance(line, list):
        _print(line, as_json)
        return
    shares = [f"{step / (steps - 1):.2f}" for step in range(steps)]
    _picture(opened, line.unsqueeze(0), [""], shares, "from A to B", out, "interpolation.png")


def traverse(
    run: Newest = None,
    dims: Annotated[
        list[int] | None,
        typer.Option(
            "--dim", help="May be repeated (default: the 8 with the highest rates).", show_default=False
        ),
    ] = None,
    of: Annotated[
        _Str,
        typer.Option(
            help="The example whose code is changed: a sentence, an image file, heldout:0 (default: z = 0).",
            show_default=False,
        ),
    ] = None,
    as_json: _Json = False,
    out: _Picture = None,
) -> None:
    """What each dimension changes: one of them moves from -2.5 to 2.5, the others stay. A picture, or, of
    text, sentences."""
    opened = _opened(run)
    rates = _rates(opened)
    if dims is None:
        most = sorted(range(len(rates)), key=lambda dim: -rates[dim])[:8]
        dims = sorted(most)
    z = None if of is None else opened.encode(inputs.example(opened.data, of, opened.config.data.size))
    rows = [opened.traverse(dim, z=z) for dim in dims]
    if as_json:
        shown = {str(dim): _plain(row) for dim, row in zip(dims, rows, strict=True)}
        print(json.dumps({"values": list(TRAVERSED), "dims": shown}))
        return
    labels = [f"dim {dim}, rate {rates[dim]:.2f}" for dim in dims]
    if isinstance(rows[0], list):
        for label, row in zip(labels, rows, strict=True):
            print(f"{label} nats")
            for value, sentence in zip(TRAVERSED, row, strict=True):
                print(f"  {value:+.1f}  {sentence}")
        return
    cells = torch.stack([row for row in rows if isinstance(row, Tensor)])
    columns = [f"{value:+.1f}" for value in TRAVERSED]
    _picture(
        opened,
        cells,
        [label.replace(", ", "\n") for label in labels],
        columns,
        "value of the dimension",
        out,
        "traversal.png",
    )


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Two runs or more.")],
    out: Annotated[_Path, typer.Option(help="Also a page with pictures, .html.", show_default=False)] = None,
    as_json: _Json = False,
) -> None:
    """Runs side by side, from their reports (made now where there is none): is the latent used, at what price
    in likelihood? The difference to the first run is paired by example."""
    if len(runs) < 2:
        raise InputError(f"compare takes two runs or more, got {len(runs)}")
    if out is not None and out.suffix != ".html":
        raise InputError(f"--out must end in .html, got {out}")
    outcomes = [comparison.outcome(path, _say) for path in runs]
    if as_json:
        print(json.dumps(comparison.to_json(outcomes)))
    else:
        comparison.show(outcomes, display.console())
    if out is not None:
        _write(out, comparison.page(outcomes, out.resolve().parent).encode())
        _say(f"with pictures: {out}")


def export(
    run: Newest = None,
    out: Annotated[
        _Path, typer.Option(help="Such as model.pt2 (default: RUN/model.pt2).", show_default=False)
    ] = None,
) -> None:
    """Encoder and decoder as programs of torch.export, model-encoder.pt2 and model-decoder.pt2."""
    opened = _opened(run)
    for path in exported.export(opened, out or opened.folder.path / "model.pt2"):
        print(path)


def settings(
    word: Annotated[_Str, typer.Argument(help="Only what has this in its name.", show_default=False)] = None,
    as_json: _Json = False,
) -> None:
    """Every setting of `train`: what it takes, its default, and what it means."""
    tables = _settings(word or "")
    if not tables:
        raise ConfigError(f"no setting has {word!r} in its name")
    if as_json:
        print(json.dumps(tables))
        return
    for table, about in tables.items():
        print(f"[{table}]\n")
        for line in about["meaning"].replace("``", "").split("\n"):
            print(f"  {line}".rstrip())
        print()
        for name, (default, takes) in about["settings"].items():
            print(f"  {table + '.' + name:34} {default:12} {takes}".rstrip())
        print()


COMMANDS: tuple[Callable[..., None], ...] = (
    sample,
    encode,
    decode,
    interpolate,
    traverse,
    compare,
    export,
    settings,
)


def _say(text: str) -> None:
    """What is about the result and not part of it."""
    print(text, file=sys.stderr)


def or_newest(path: Path | None) -> Path:
    """``path``, or the newest run below runs/, which is said."""
    if path is None:
        path = newest_run()
        _say(f"the newest run: {path}")
    return path


def _opened(path: Path | None) -> Run:
    return open_run(or_newest(path), say=_say)


def _show(run: Run, decoded: Decoded, name: str, as_json: bool, out: Path | None) -> None:
    if out is not None and out.suffix != ".png":
        _write(out, _decoded_file(decoded, out))
        print(out)
    elif as_json or isinstance(decoded, list) or decoded.dim() == 2:
        if out is not None:
            raise InputError(f"--out {out}: a picture is for images; use .npy, .csv, .json or .txt")
        _print(decoded, as_json)
    else:
        columns = min(10, len(decoded))
        full = decoded[: len(decoded) // columns * columns]
        cells = full.reshape(-1, columns, *decoded.shape[1:])
        _picture(
            run,
            cells,
            [""] * len(cells),
            [""] * columns,
            f"{name} of {run.folder.path.name}",
            out,
            f"{name}.png",
        )


def _print(decoded: Decoded, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(decoded)))
    elif isinstance(decoded, list):
        print("\n".join(decoded))
    else:
        print(_table(None, decoded), end="")


def _plain(decoded: Decoded) -> Any:
    return decoded if isinstance(decoded, list) else decoded.tolist()


def _picture(
    run: Run,
    cells: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    out: Path | None,
    name: str,
) -> None:
    from vaekernels.training import pictures

    if out is not None and out.suffix != ".png":
        raise InputError(f"--out must end in .png, got {out}")
    if cells.dim() == 5 and (
        cells.min() < 0 or cells.max() > 1
    ):  # real numbers: black and white are extremes
        cells = (cells - cells.min()) / (cells.max() - cells.min())
    path = out or run.folder.path / name
    _write(path, pictures.grid(cells, rows, columns, title))
    print(path)


def _codes_file(codes: Codes, suffix: str) -> bytes:
    parts = {"mu": codes.mu, "logvar": codes.logvar, "rate": codes.rate}
    dims = codes.mu.shape[1]
    if suffix == ".csv":
        names = [f"{name}_{dim}" for name in parts for dim in range(dims)]
        return _table(names, torch.cat(list(parts.values()), dim=1)).encode()
    rows = np.empty(len(codes.mu), dtype=[(name, np.float32, (dims,)) for name in parts])
    for name, part in parts.items():
        rows[name] = part.numpy()
    return _npy(rows)


def _decoded_file(decoded: Decoded, out: Path) -> bytes:
    if out.suffix == ".json":
        return json.dumps(_plain(decoded)).encode()
    if isinstance(decoded, list):
        if out.suffix != ".txt":
            raise InputError(f"--out of sentences must end in .txt or .json, got {out}")
        return "".join(f"{sentence}\n" for sentence in decoded).encode()
    if out.suffix == ".npy":
        return _npy(decoded.numpy())
    if out.suffix == ".csv":
        return _table(None, decoded.flatten(1)).encode()
    raise InputError(f"--out must end in .npy, .csv, .json or, of images, .png, got {out}")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _table(names: Sequence[str] | None, rows: Tensor) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if names is not None:
        writer.writerow(names)
    writer.writerows([f"{value:.9g}" for value in row] for row in rows.tolist())
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _rates(run: Run) -> list[float]:
    """Held out, of every dimension, as the training measured them last."""
    try:
        found = json.loads(run.folder.metrics.read_text(encoding="utf-8"))["heldout"]["rate_per_dim"]
        return [float(rate) for rate in found]
    except (OSError, ValueError, KeyError, TypeError):  # not trained to its end: there is no METRICS yet
        run.require_examples()
        return run.encode(run.data.heldout).rate.mean(dim=0).tolist()


def _settings(word: str) -> dict[str, Any]:
    tables = {}
    for table in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[table.name]
        hints = typing.get_type_hints(kind, include_extras=True)
        rows = {
            each.name: (
                "(needed)" if each.default is dataclasses.MISSING else _written(each.default),
                _takes(hints[each.name]),
            )
            for each in dataclasses.fields(kind)
            if word in f"{table.name}.{each.name}"
        }
        if rows:
            paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
            told = [each for each in paragraphs if any(name in each for name in rows)]
            tables[table.name] = {"meaning": "\n\n".join(told if word else paragraphs), "settings": rows}
    return tables


def _written(default: object) -> str:
    """As ``--set`` takes it."""
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _takes(hint: Any) -> str:
    """A type of `config.schema` in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, parts))
    if typing.get_origin(hint) is not typing.Annotated:  # a union with None
        told = [("none" if part is type(None) else _takes(part)) for part in parts]
        return ", or ".join(told) if told else getattr(hint, "__name__", str(hint))
    kind: Any = parts[0]
    limits: dict[str, float] = {}
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    for field in parts[1:]:
        for limit in getattr(field, "metadata", ()):
            limits |= {name: getattr(limit, name) for name in ("gt", "ge", "le") if hasattr(limit, name)}
    words = {"gt": "above {:g}", "ge": "at least {:g}", "le": "at most {:g}"}
    name = {float: "a number", int: "a whole number", bool: "true | false", str: "text"}.get(kind, str(kind))
    told = [words[limit].format(value) for limit, value in limits.items() if abs(value) < 2**32]
    return ", ".join([name, *told])
