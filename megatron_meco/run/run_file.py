"""Read a run file: one YAML file that says corpus, template, model, schedule and layout.

Its keys are the flags of the training script, Megatron's and MeCo's, without dashes in front, and
two more: `model` (flags of a known model, see `presets.yaml`) and `launch` (how the ranks start).
`read_run` checks keys and types in milliseconds; what the values mean together is checked by
Megatron's own parser and validation (`check`). Paths are relative to the folder of the run file:
every command works there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_meco.errors import MeCoError
from megatron_meco.run.flag_table import KnownFlag, flag_table, key_of
from megatron_meco.run.launch import LAUNCH_KEYS, Launch, read_launch
from megatron_meco.run.plain_yaml import (
    Entries,
    Node,
    RunFileError,
    Scalar,
    parse,
    parse_value,
    read_text,
)
from megatron_meco.run.presets import FOLLOWS_FROM, complete, flags_of_model, model_names
from megatron_meco.run.values import nearest, switch_of, words_of

MODEL, LAUNCH, MECO = "model", "launch", "meco"
_OWN_KEYS = (MODEL, LAUNCH)
# Read before Megatron's parser, in a form of Megatron's own.
_REFUSED = {"yaml-cfg": "it is another kind of run file, which Megatron reads on its own"}
_SET = "--set"


@dataclass(frozen=True)
class Setting:
    """A flag with its values.

    Attributes:
        flag: The flag.
        words: Its values as on a command line; none for a switch.
        on: False for a switch that is off.
        where: Where the value comes from: `FILE:LINE`, `--set key=value`, or what it follows from.
    """

    flag: KnownFlag
    words: tuple[str, ...]
    on: bool
    where: str

    @property
    def command(self) -> tuple[str, ...]:
        """The option and its values; nothing for a switch that is off."""
        if self.on and len(self.words) == 1 and self.words[0].startswith("-"):
            # argparse would take it for another option, unless it is a number.
            return (f"{self.flag.option}={self.words[0]}",)
        if self.on:
            return (self.flag.option, *self.words)
        return (self.flag.off,) if self.flag.off else ()


@dataclass(frozen=True)
class RunFile:
    """What a run file says, its model's flags and what follows from both included.

    Attributes:
        path: The file, as it was named.
        folder: The folder that its paths are relative to: its own.
        text: All that it holds.
        settings: Flags by key, in the order of the command line.
        launch: How the ranks start.
        model: The model that it names, or None.
        overrides: The values of `--set`.
    """

    path: Path
    folder: Path
    text: str
    settings: Mapping[str, Setting]
    launch: Launch
    model: str | None = None
    overrides: tuple[str, ...] = field(default=())

    @property
    def trains_with_meco(self) -> bool:
        """Whether the run has `--meco`."""
        return self.settings[MECO].on

    def flags(self) -> list[str]:
        """The flags of the training script, `--meco` among them."""
        return [word for setting in self.settings.values() for word in setting.command]

    def value(self, key: str) -> str | None:
        """The value of a flag that takes one, or None where it is not given."""
        setting = self.settings.get(key)
        return setting.words[0] if setting is not None and setting.words else None

    def locate(self, error: MeCoError) -> MeCoError:
        """The same refusal, with the place in this file of the flag or value that it names."""
        setting = self._named_by(error)
        place = setting.where if setting is not None else str(self.path)
        return RunFileError(error.what, where=f"{place}: {error.where}", remedy=error.remedy)

    def _named_by(self, error: MeCoError) -> Setting | None:
        # A refusal of a flag begins with it: `--seq-length 64`; one of a corpus with its path.
        named = [
            setting
            for setting in self.settings.values()
            if any(_is_of_path(error.where, word) for word in setting.words)
        ]
        # Megatron's assertions name arguments: `args.seq_length`, `--seq-length` or seq_length.
        by_dest = {setting.flag.dest: setting for setting in self.settings.values()}
        for word in re.findall(r"[\w-]+", f"{error.where} {error.what}"):
            key, dest = key_of(word), word.strip("-").replace("-", "_")
            if word.startswith("--") and key in self.settings:
                named.append(self.settings[key])
            elif "_" in dest and dest in by_dest:
                named.append(by_dest[dest])
            named += [
                self.settings[key] for key in _MEGATRONS.get(dest, ()) if key in self.settings
            ]
        # What somebody wrote is more likely wrong than what a model has.
        return next((s for s in named if "(model " not in s.where), named[0] if named else None)


# Names in Megatron's assertions that no flag has, and the keys that they come from.
_MEGATRONS = {
    "lr_warmup_steps": ("lr-warmup-iters", "lr-warmup-samples", "lr-warmup-fraction"),
    "lr_decay_steps": ("lr-decay-iters", "lr-decay-samples"),
}


def _is_of_path(where: str, path: str) -> bool:
    """Whether a refusal is about a path or a file that belongs to it, such as `PATH.idx`."""
    if os.sep in path:
        return where.startswith(path)
    return path != "" and (where == path or where.startswith((f"{path}.", path + os.sep)))


def read_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file.

    Args:
        path: The file.
        overrides: `key=value` as after `--set`; later ones win, and all win over the file.

    Raises:
        RunFileError: A key is unknown, a value is of another type, or the file is no YAML; names
            the file, the line and the remedy.
    """
    file = Path(path)
    text = read_text(file)
    given: dict[str, _Given] = {}
    for key, node in parse(text, str(file)).entries:
        where = f"{file}:{key.line}"
        name = _known_key(key.text, where)
        given[name] = _Given(name, node, where)
    for override in overrides:
        _override(given, override)
    return _resolve(file, text, given, tuple(overrides))


@dataclass(frozen=True)
class _Given:
    """A key, its value, and where both are written."""

    key: str
    node: Node
    where: str


def _known_key(text: str, where: str) -> str:
    name = text.replace("_", "-")
    if name in _REFUSED:
        raise RunFileError(
            f"{text} does not go with a run file: {_REFUSED[name]}",
            where=where,
            remedy="Take it out.",
        )
    if name in _OWN_KEYS or name in flag_table():
        return name
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    if name.startswith("-"):
        bare = name.lstrip("-")
        hint = f" Write {bare}." if bare in flag_table() else ""
        raise RunFileError(
            f"the key {shown} begins with a dash", where=where, remedy=f"Drop the dashes.{hint}"
        )
    if name in LAUNCH_KEYS:
        raise RunFileError(
            f"{shown} is a key of launch",
            where=where,
            remedy=f"Write `launch:` and, indented below it, `{name}: ...`.",
        )
    hint = nearest(name, [*flag_table(), *_OWN_KEYS])
    raise RunFileError(
        f"unknown key {shown}",
        where=where,
        remedy=hint.strip() or "Keys are Megatron's and MeCo's flags, `model` and `launch`.",
    )


def _override(given: dict[str, _Given], override: str) -> None:
    name, equals, value = override.partition("=")
    where = f"{_SET} {override}"
    if not equals or not name.strip():
        raise RunFileError("is not key=value", where=where, remedy="Write --set lr=1e-3.")
    node = parse_value(value, where) or Scalar("", True, 0)
    parts = name.strip().replace("_", "-").split(".")
    key = _known_key(parts[0], where)
    if key != LAUNCH and len(parts) > 1:
        raise RunFileError(
            f"{key} has no keys inside", where=where, remedy=f"Write --set {key}={value}."
        )
    for part in reversed(parts[1:]):
        node = Entries(((Scalar(part, True, 0), node),), 0)
    if len(parts) > 1 and key in given:
        node = _merged(given[key].node, node)
        where = given[key].where
    # At its old place, so that flags keep the order of the file.
    given[key] = _Given(key, node, where)


def _merged(old: Node, new: Node) -> Node:
    """The old keys with the new ones in place of those of the same name."""
    if not isinstance(old, Entries) or not isinstance(new, Entries):
        return new
    entries = {key.text.replace("_", "-"): (key, node) for key, node in old.entries}
    for key, node in new.entries:
        name = key.text.replace("_", "-")
        before = entries.get(name)
        entries[name] = (key, _merged(before[1], node) if before else node)
    return Entries(tuple(entries.values()), old.line)


def _resolve(
    file: Path, text: str, given: dict[str, _Given], overrides: tuple[str, ...]
) -> RunFile:
    own = {name: given.pop(name) for name in _OWN_KEYS if name in given}
    model = _model(own[MODEL]) if MODEL in own else None
    launch = read_launch(own[LAUNCH].node, file) if LAUNCH in own else Launch()
    settings = {MECO: Setting(flag_table()[MECO], (), True, "the default of run files")}
    if model is not None:
        place = f"{own[MODEL].where} (model {model})"
        for key, node in flags_of_model(model, given).items():
            settings[key] = _setting(_Given(key, node, place))
    own_settings = {key: _setting(entry) for key, entry in given.items()}
    _check_same(own_settings)
    dests = {setting.flag.dest for setting in own_settings.values()}
    # In the model's order, so that one value changes one line of the command.
    kept = {k: s for k, s in settings.items() if k in own_settings or s.flag.dest not in dests}
    settings = {**kept, **own_settings}
    if model is not None:
        on = {key: setting.words for key, setting in settings.items() if setting.on}
        off = {key: () for key, setting in settings.items() if not setting.on}
        for key, words in complete({**off, **on}).items():
            source = settings.get(FOLLOWS_FROM[key])
            where = place if source is None else f"{source.where}, from {source.flag.key}"
            settings[key] = Setting(flag_table()[key], words, True, where)
    settings.update(_of_folder(settings, file))
    return RunFile(file, file.absolute().parent, text, settings, launch, model, overrides)


def _of_folder(settings: Mapping[str, Setting], file: Path) -> dict[str, Setting]:
    """Where a run saves, goes on from and writes its curves, unless the file says it.

    `runs/NAME` for NAME.yaml. Without save-interval Megatron has no use for a folder.
    """
    own: dict[str, Setting] = {}
    if "save" in settings:
        save = settings["save"]
    elif "save-interval" in settings:
        folder = os.path.join("runs", file.stem)
        save = own["save"] = Setting(flag_table()["save"], (folder,), True, str(file))
    else:
        return own
    for key, folder in (
        ("load", save.words[0]),
        ("tensorboard-dir", os.path.join(save.words[0], "tensorboard")),
    ):
        if key not in settings:
            own[key] = Setting(flag_table()[key], (folder,), True, save.where)
    return own


def _model(entry: _Given) -> str:
    flag = KnownFlag(option="--model", dest="", kind="text", choices=tuple(model_names()))
    return words_of(flag, entry.node, entry.where)[0]


def _setting(entry: _Given) -> Setting:
    flag = flag_table()[entry.key]
    if flag.kind == "switch":
        return Setting(flag, (), switch_of(flag.key, entry.node, entry.where), entry.where)
    words = words_of(flag, entry.node, entry.where)
    if flag.key in ("meco-template", "meco-suffix-template"):
        # Both mean the same to MeCo, and a command with line ends is hard to read.
        words = tuple(word.replace("\n", r"\n").replace("\t", r"\t") for word in words)
    return Setting(flag, words, True, entry.where)


def _check_same(settings: Mapping[str, Setting]) -> None:
    """Refuse two names of one argument, of which argparse would take the later in silence."""
    by_dest: dict[str, Setting] = {}
    for setting in settings.values():
        first = by_dest.setdefault(setting.flag.dest, setting)
        if first is not setting:
            raise RunFileError(
                f"{setting.flag.key} says the same as {first.flag.key} ({first.where}), or its "
                "opposite",
                where=setting.where,
                remedy="Keep one of them.",
            )


@contextlib.contextmanager
def training_flags(words: list[str]) -> Iterator[list[str]]:
    """The flags of a run for a command that takes them, which may be given as a run file.

    While the block runs, the process is in the folder of the run file and has its number of ranks;
    a refusal that names a flag gets the flag's place in the file.

    Args:
        words: What the command's own parser does not know: flags, or a run file and `--set`s.

    Yields:
        The flags, without `--meco`.

    Raises:
        MeCoError: The run file says no run, or there are flags beside it.
    """
    if not _is_run_file(words):
        yield words
        return
    path, overrides, others = _split(words)
    if others:
        key, _, value = others[0].removeprefix("--").partition("=")
        raise MeCoError(
            "flags do not go with a run file",
            where=others[0],
            remedy=f"Write --set {key}={value or 'VALUE'}.",
        )
    run = read_run(path, overrides)
    if not run.trains_with_meco:
        raise RunFileError(
            "this command shows what MeCo trains on, and meco is false",
            where=run.settings[MECO].where,
            remedy="Take it out, or write meco-template: '' for the baseline.",
        )
    earlier = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(run.launch.num_ranks)
    try:
        with contextlib.chdir(run.folder):
            yield [word for word in run.flags() if word != "--meco"]
    except RunFileError:
        raise
    except MeCoError as error:
        raise run.locate(error) from error
    finally:
        del os.environ["WORLD_SIZE"]
        if earlier is not None:
            os.environ["WORLD_SIZE"] = earlier


def copy_of(run: RunFile) -> str:
    """The text of a run file with its path and its `--set`s, as a run's folder keeps it."""
    sets = [f"# --set {' '.join(override.splitlines())}\n" for override in run.overrides]
    return "".join([f"# {run.path.absolute()}\n", *sets, run.text])


def original_words(copy: Path) -> list[str]:
    """The words that name the run file of a copy: its path, and `--set`s.

    Args:
        copy: What `copy_of` gave.

    Raises:
        RunFileError: The run file is no longer where it was.
    """
    lines = read_text(copy).splitlines()
    path = Path(lines[0].removeprefix("# ")) if lines else Path()
    if not path.is_file():
        raise RunFileError(
            f"{path} is no longer there", where=str(copy), remedy="Give the run file itself."
        )
    words = [str(path)]
    for line in lines[1:]:
        if not line.startswith("# --set "):
            break
        words += ["--set", line.removeprefix("# --set ")]
    return words


def _is_run_file(words: list[str]) -> bool:
    rest = iter(words)
    for word in rest:
        if word == _SET:
            next(rest, None)
        elif not word.startswith(f"{_SET}="):
            # Flags begin with a dash, and what follows a flag is its value.
            return not word.startswith("-")
    return False


def _split(words: list[str]) -> tuple[str, list[str], list[str]]:
    """The run file, the values of `--set`, and everything else."""
    path, overrides, others = "", [], []
    rest = iter(words)
    for word in rest:
        if word == _SET:
            overrides.append(next(rest, ""))
        elif word.startswith(f"{_SET}="):
            overrides.append(word.removeprefix(f"{_SET}="))
        elif not path:
            path = word
        else:
            others.append(word)
    return path, overrides, others
