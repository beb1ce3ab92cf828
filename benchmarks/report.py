"""From committed results to the README's table and the plots; and the gates.

python benchmarks/report.py --import RAW.json --machine NAME   keep what matters of pytest-benchmark JSONs, then:
python benchmarks/report.py                                    rewrite the tables and plots from benchmarks/results:
                                                               gated rows in README.md, all in results/README.md
python benchmarks/report.py --verify                           exit 1 if tables and results disagree
python benchmarks/report.py --check                            exit 1 if a result misses its gate (CPU gates hold for
                                                               a process with the default allocator)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
TABLES, COMMAND = RESULTS / "README.md", "python benchmarks/report.py"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LAYOUTS = ("nchw", "channels_last")
UNMEASURED = "not yet measured"
NOT_SLOWER, LINEAR = 0.95, 1.3

_ALLOCATORS = {"default": "glibc's default malloc", "keep": "malloc that keeps freed memory"}

Results = dict[str, dict]  # machine -> what reduce() made


def reduce(raw: dict) -> Iterator[tuple[str, dict]]:
    """(op, results) for each op in a JSON of pytest-benchmark, without its samples."""
    session = raw["segops"]
    head = {name: session[name] for name in ("device", "machine", "allocator", "versions", "peaks")}
    head["date"], head["commit"] = raw["datetime"][:10], raw["commit_info"].get("id", "unknown")
    head["uncommitted_changes"] = raw["commit_info"].get("dirty")
    rows, wrong = [entry["extra_info"] for entry in raw["benchmarks"]], session["failed"]
    for op in sorted({row["op"] for row in (*rows, *wrong)}):
        mine = [_rounded({key: value for key, value in row.items() if key != "op"}) for row in rows if row["op"] == op]
        failed = [row["sentence"] for row in wrong if row["op"] == op]
        yield op, {**_rounded(head), "failed": failed, "rows": mine}


def joined(parts: list[dict]) -> dict:
    """One measurement whose rows were taken in several runs on one machine at one commit; peaks are the first run's."""
    first = parts[0]
    for part in parts[1:]:
        if any(part[k][i] != first[k][i] for k, i in (("commit_info", "id"), ("segops", "machine"))):
            sys.exit("the parts come from different machines or commits")
        first["benchmarks"] += part["benchmarks"]
        first["segops"]["failed"] += part["segops"]["failed"]
    return first


def load(op: str) -> Results:
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{op}.json"))}
    return {machine: results for machine, results in found.items() if "rows" in results}


def ops() -> list[str]:
    paths = RESULTS.glob("*/*.json")
    return sorted({path.stem for path in paths if "rows" in json.loads(path.read_text())})


def models() -> dict[str, list[dict]]:
    """Machine -> results of whole models against their eager twins."""
    found: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        results = json.loads(path.read_text())
        if "directions" in results:
            found.setdefault(path.parent.name, []).append(results)
    return found


def readme_section() -> str:
    """What stands between the markers: for each CPU the gated rows of all ops, whole models, then the plots."""
    machines: dict[str, dict[str, dict]] = {}
    gpus: dict[str, dict[str, dict]] = {}
    for op in ops():
        for machine, results in load(op).items():
            if results["device"] == "cuda":
                gpus.setdefault(machine, {})[op] = results
            elif results["allocator"] == "default":
                machines.setdefault(machine, {})[op] = results
    parts = [_summary(machine, by_op, gpus) for machine, by_op in machines.items()]
    parts += [_models(machine, results) for machine, results in models().items()]
    plots = [op for op in ops() if (RESULTS / f"{op}_scaling.png").exists()]
    parts += [f"![Time and memory against pixels](benchmarks/results/{op}_scaling.png)" for op in plots]
    parts.append("Every row, rival and error: [benchmarks/results](benchmarks/results/README.md).")
    return "\n\n".join(parts)


def tables() -> str:
    """benchmarks/results/README.md: everything that was measured."""
    parts = [f"## {op}\n\n{_section(op, load(op))}" for op in ops()]
    parts += [f"## Whole models\n\n{_models(machine, results)}" for machine, results in models().items()]
    return "\n\n".join(["# Results", f"Written by `{COMMAND}`.", *parts]) + "\n"


def verify() -> str | None:
    """None, or why the tables and the results disagree."""
    text = README.read_text()
    if BEGIN not in text or END not in text:
        return f"{README.name} has no {BEGIN} ... {END}"
    shown = {README.name: (text.split(BEGIN)[1].split(END)[0].strip(), readme_section().strip())}
    shown[str(TABLES.relative_to(ROOT))] = (TABLES.read_text() if TABLES.exists() else "", tables())
    for name, (have, want) in shown.items():
        if have != want:
            return f"{name} does not show benchmarks/results; run {COMMAND}"
    return None


def gates(results: dict) -> Iterator[tuple[bool, str]]:
    """(passed, sentence) for everything the results promise."""
    for sentence in results["failed"]:
        yield False, f"wrong result: {sentence}"
    for row in results["rows"]:
        name = _name(row)
        for what, least in row["gates"].items():
            if what == "floor":
                for kind in ("floor", "reference_floor"):
                    if f"percent_of_{kind}" in row:
                        yield _at_least(f"{name}: % of the {kind.replace('_', ' ')}", row[f"percent_of_{kind}"], least)
            else:
                yield _at_least(f"{name}: times faster than {what}", row["ratio"].get(what, 0), least)
        if row["dtype"] == "bfloat16":
            yield _at_least(f"{name}: speed over float32", row["ratio"]["float32"], NOT_SLOWER)
        memory = row["memory"]["segops"]
        if row["memory_allowed"] is not None and row["dtype"] == "float32":
            extra, allowed = memory.get("extra_bytes"), row["memory_allowed"] / 1e6
            if extra is None:
                yield False, f"{name}: memory: {memory['reason']}"
            else:
                yield (
                    extra <= row["memory_allowed"],
                    f"{name}: extra memory {extra / 1e6:.2f} MB, at most {allowed:.2f}",
                )
    for series, members in _series(results).items():
        first, last = members[0], members[-1]
        growth = last["seconds"]["segops"]["min"] / first["seconds"]["segops"]["min"]
        most = LINEAR * _pixels(last) / _pixels(first)
        name = f"{series}: time of {last['case']} over {first['case']}"
        yield growth <= most, f"{name} {growth:.1f}, at most {most:.1f}"


def model_gates(results: dict) -> Iterator[tuple[bool, str]]:
    for row in results["directions"]:
        for layout, ratio in row["times_faster"].items():
            if row["gate"] is not None:
                what = f"{results['model']} {row['direction']} {layout}: times faster than eager"
                yield _at_least(what, ratio, row["gate"])


def _at_least(what: str, value: float, least: float) -> tuple[bool, str]:
    return value >= least, f"{what} {value:.3g}, at least {least:g}"


def _section(op: str, machines: Results) -> str:
    cpus = {name: results for name, results in machines.items() if results["device"] == "cpu"}
    gpus = {name: results for name, results in machines.items() if results["device"] == "cuda"}
    parts = [_table(op, name, results, gpus) for name, results in cpus.items()]
    if (RESULTS / f"{op}_scaling.png").exists():
        parts.append(f"![Time and memory against pixels]({op}_scaling.png)")
    return "\n\n".join(parts)


def _summary(machine: str, by_op: dict[str, dict], gpus: dict[str, dict[str, dict]]) -> str:
    title = [
        "op",
        "case",
        "direction",
        "segops, ms",
        "times faster than",
        "% of floor",
        "memory, MB",
        *(gpus or ["GPU"]),
    ]
    lines = [title, ["---"] * 3 + ["---:"] + ["---"] + ["---:"] * (len(title) - 5)]
    for op, results in by_op.items():
        for group in _groups([row for row in results["rows"] if row["gates"]]):
            row = group[0]
            rivals = dict.fromkeys(name for r in group for name in r["ratio"])
            faster = [f"{name} {_both(group, lambda r, name=name: _ratio(r, name, []))}" for name in rivals]
            lines.append([
                f"`{op}`", _case(row), row["direction"],
                _both(group, lambda r: f"{1e3 * r['seconds']['segops']['min']:.3g}"), ", ".join(faster),
                _both(group, lambda r: f"{r['percent_of_floor']:.0f}" if "percent_of_floor" in r else "?"),
                _both(group, _memory),
                *([_on_gpu(row, gpu[op]) if op in gpu else UNMEASURED for gpu in gpus.values()] or [UNMEASURED]),
            ])  # fmt: skip
        lines += [[f"`{op}`", f"**FAIL**: {failed}"] + [""] * (len(title) - 2) for failed in results["failed"]]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    results = next(iter(by_op.values()))
    facts = results["machine"]
    return (
        f"On {facts['cpu']}, {facts['threads']} threads, {facts.get('isa', 'no CPU kernels')}, torch "
        f"{results['versions']['torch']} ({machine}), float32; NCHW / channels_last, each rival in its own "
        f"best layout:\n\n{table}"
    )


def model_table(results: dict) -> str:
    """Markdown, a row per direction of what a script over _models.py measured."""
    title = ["model", "direction", "batch", "segops, ms", "eager, ms", "times faster", "segops, MiB", "eager, MiB"]
    lines = [title, ["---"] * 2 + ["---:"] * 6]
    for row in results["directions"]:
        each = [[values[x] for x in LAYOUTS] for values in (row["ms"]["segops"], row["times_faster"])]
        lines.append([
            results["model"], row["direction"].replace("_", " "), str(row["batch"]),
            " / ".join(f"{ms:.0f}" for ms in each[0]), f"{min(row['ms']['eager'].values()):.0f}",
            " / ".join(f"{ratio:.2f}" for ratio in each[1]),
            *(f"{min(row['peak_mib'][side].values()):.0f}" for side in ("segops", "eager")),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _models(machine: str, results: list[dict]) -> str:
    tables = [model_table(each).split("\n") for each in results]
    rows = [tables[0][:2], *(lines[2:] for lines in tables)]
    facts = ", ".join(sorted({f"{r['threads']} threads, torch {r['versions']['torch']}" for r in results}))
    commits = ", ".join(dict.fromkeys(f"{r['commit'][:10]}, {r['date']}" for r in results))
    return (
        f"Whole models, float32, on {machine} ({facts}; commit {commits}): segops for NCHW / channels_last images, "
        "eager PyTorch in its best format; a prediction is labels of the image's size, memory the peak of a fresh "
        "process.\n\n" + "\n".join(line for lines in rows for line in lines)
    )


def _table(op: str, machine: str, results: dict, gpus: Results) -> str:
    rivals = list(dict.fromkeys(name for row in results["rows"] for name in (*row["ratio"], *row["reasons"])))
    notes: list[str] = []
    title = ["case", "dtype", "direction", "segops, ms", *(f"x {name}" for name in rivals)]
    title += ["% of floor", "memory, MB", "error", *(gpus or ["GPU"])]
    lines = [title, ["---"] * 3 + ["---:"] * (len(title) - 3)]
    for group in _groups(results["rows"]):
        row = group[0]
        cells = [_case(row), row["dtype"], row["direction"]]
        cells.append(_both(group, lambda r: f"{1e3 * r['seconds']['segops']['min']:.3g}"))
        cells += [_both(group, lambda r, name=name: _ratio(r, name, notes)) for name in rivals]
        cells.append(_both(group, lambda r: f"{r['percent_of_floor']:.0f}" if "percent_of_floor" in r else "?"))
        cells.append(_both(group, _memory))
        cells.append(f"{max(error for r in group for error in r['error'].values()):.1e}")
        cells += [_on_gpu(row, gpu) for gpu in gpus.values()] or [UNMEASURED]
        lines.append(cells)
    lines += [[f"**FAIL**: {sentence}"] + [""] * (len(title) - 1) for sentence in results["failed"]]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    facts, versions = results["machine"], results["versions"]
    peaks = results["peaks"]
    measured = (
        f"{peaks['bytes'] / 1e9:.1f} GB/s, {peaks['flops'] / 1e9:.0f} GF/s, {peaks['exps'] / 1e9:.2f} Gexp/s"
        if "bytes" in peaks
        else peaks["reason"]
    )
    rounds = max((row["seconds"]["segops"]["rounds"] for row in results["rows"]), default=0)
    caption = (
        f"`{op}` on {machine} ({facts['cpu']}, {facts['threads']} threads, {facts.get('isa', 'no CPU kernels')}, "
        f"{_ALLOCATORS[results['allocator']]}; torch "
        f"{versions['torch']}; commit {results['commit'][:10]}, {results['date']}). Two values: NCHW / channels_last "
        "inputs. `x rival`: how many times faster segops is than the rival in its own best layout and formulation, "
        f"sides interleaved, minimum of {rounds} rounds; `x float32`: than segops itself in "
        "float32. The floor follows from necessary bytes, flops and exps and "
        f"this run's peaks ({measured}). Memory is what a call takes beyond its outputs, error the RMS against "
        "float64, the worst of output and gradients."
    )
    footnotes = " ".join(f"[{i}] {note}." for i, note in enumerate(notes, 1))
    return "\n\n".join([caption, table, *([footnotes] if footnotes else [])])


def _ratio(row: dict, name: str, notes: list[str]) -> str:
    if name in row["ratio"]:
        value = row["ratio"][name]
        return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
    if name not in row["reasons"]:
        return "-"
    note = f"{name}: {row['reasons'][name].rstrip('.')}"
    if note not in notes:
        notes.append(note)
    return f"[{notes.index(note) + 1}]"


def _memory(row: dict) -> str:
    memory = row["memory"]["segops"]
    return f"{memory['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in memory else memory["reason"]


def _both(group: list[dict], cell) -> str:
    """One cell per layout; a dash in the second place is left out."""
    cells = [cell(row) for row in group]
    return " / ".join(cells if cells[-1] != "-" else cells[:1])


def _on_gpu(row: dict, results: dict) -> str:
    same = [r for r in results["rows"] if _key(r) == _key({**row, "isa": None})]
    if not same:
        return UNMEASURED
    best = min(same, key=lambda r: r["seconds"]["segops"]["min"])
    text = f"{1e6 * best['seconds']['segops']['min']:.0f} us ({best['backend']})"
    if best["ratio"]:
        text += "; " + ", ".join(f"{name} {ratio:.1f}x" for name, ratio in best["ratio"].items())
    return text


def _groups(rows: list[dict]) -> list[list[dict]]:
    """The layouts of one case together, NCHW first; scaling rows are for the plot."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["series"] is None:
            groups.setdefault(_key({**row, "layout": None}), []).append(row)
    return [sorted(group, key=lambda row: LAYOUTS.index(row["layout"])) for group in groups.values()]


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("case", "dtype", "layout", "direction", "isa"))


def _case(row: dict) -> str:
    shape = "x".join(map(str, next(iter(row["shape"].values()))))
    return f"{row['case']} ({shape}" + (")" if row["isa"] in (None, "avx512") else f", {row['isa']})")


def _name(row: dict) -> str:
    parts = [row[name] for name in ("case", "dtype", "layout", "direction", "isa")]
    return " ".join(part for part in parts if part)


def _pixels(row: dict) -> int:
    n, _, h, w = next(iter(row["shape"].values()))
    return n * h * w


def _series(results: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in results["rows"]:
        if row["series"] is not None:
            found.setdefault(row["series"], []).append(row)
    return {name: sorted(rows, key=_pixels) for name, rows in found.items()}


def plot(op: str, machine: str, results: dict) -> Path | None:
    """Time and memory against pixels, one line per contender; a line ends where its contender did."""
    members = [row for rows in _series(results).values() for row in rows]
    if not members:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = ["segops", *dict.fromkeys(name for row in members for name in row["ratio"])]
    colours = dict(zip(names, ("#0b6e4f", "#c0392b", "#e08e0b", "#2c6fbb", "#7d3c98", "#666666"), strict=False))
    for name in names:
        style = dict(
            color=colours[name], marker="o", markersize=4, linewidth=2.4 if name == "segops" else 1.4, label=name
        )
        timed = [(_pixels(row), 1e3 * row["seconds"][name]["min"]) for row in members if name in row["seconds"]]
        time.plot(*zip(*timed, strict=True), **style)
        weighed = [(_pixels(row), row["memory"].get(name, {}).get("extra_bytes")) for row in members]
        weighed = [(pixels, max(extra, 1e4) / 1e6) for pixels, extra in weighed if extra is not None]
        if weighed:
            memory.plot(*zip(*weighed, strict=True), **style)
    output = [(_pixels(row), row["output_bytes"] / 1e6) for row in members]
    memory.plot(*zip(*output, strict=True), color="#999999", linestyle="--", linewidth=1.2, label="the output itself")
    ticks = [_pixels(row) for row in members]
    labels = [f"{round(pixels**0.5)}²" for pixels in ticks]
    for axis, title in ((time, "forward, ms"), (memory, "memory beyond the output, MB")):
        axis.set(xscale="log", yscale="log", xlabel="pixels", title=title)
        axis.set_xticks(ticks, labels)
        axis.minorticks_off()
        axis.grid(True, color="#e4e4e4", linewidth=0.7)
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{op}, {members[0]['dtype']}, {machine} ({results['machine']['threads']} threads)", fontsize=11)
    path = RESULTS / f"{op}_scaling.png"
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return path


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _dumps(results: dict) -> str:
    """One row per line, so that a diff shows which rows moved."""
    rows = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    return head[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--import", dest="raw", type=Path, nargs="+", metavar="RAW.json", help="parts of one measurement"
    )
    parser.add_argument("--machine", help="folder under benchmarks/results, such as xeon-2core")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if (arguments.raw is None) != (arguments.machine is None):
        parser.error("--import and --machine go together")
    if arguments.verify:
        reason = verify()
        print(reason or "README and results agree")
        return reason is not None
    if arguments.check:
        missed = 0
        for op in ops():
            for machine, results in load(op).items():
                for passed, sentence in gates(results) if results["allocator"] == "default" else ():
                    print("pass" if passed else "MISS", op, machine, sentence)
                    missed += not passed
        for machine, found in models().items():
            for passed, sentence in (gate for results in found for gate in model_gates(results)):
                print("pass" if passed else "MISS", machine, sentence)
                missed += not passed
        print(f"{missed} missed")
        return missed > 0
    if arguments.raw is not None:
        folder = RESULTS / arguments.machine
        folder.mkdir(parents=True, exist_ok=True)
        for op, results in reduce(joined([json.loads(path.read_text()) for path in arguments.raw])):
            (folder / f"{op}.json").write_text(_dumps(results))
    for op in ops():
        for machine, results in load(op).items():
            if results["device"] == "cpu":
                plot(op, machine, results)
    TABLES.write_text(tables())
    text = README.read_text()
    if BEGIN not in text or END not in text:
        print(f"{README.name} has no {BEGIN} ... {END}; nothing written there", file=sys.stderr)
        return 1
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{readme_section()}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
