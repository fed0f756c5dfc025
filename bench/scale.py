"""Many devices predicted, and a few processes measured.

python bench/scale.py predict [--png scaling.png]                     step times up to 4,096 GPUs
python bench/scale.py measure [--processes 2 3 4] [--kinds pipeline]  throughput of processes of one thread, measured,
                                                                      beside what the model says of a pipeline

Processes that train apart, each its own net, show what the machine has to give. Measured ratios mean something on a
machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def titled(args):
    return f"{args.layers} layers of {args.width}, {args.images} images a step, {args.device}, bf16"


def predict(args):
    from ffkernels.benchmark import scale

    net = scale.Net((args.width, *[args.width] * args.layers), args.images)
    rows = scale.table(net, COUNTS, args.device)
    kinds = [f"{kind} {how}" for how in ("data", "pipeline", "both") for kind in ("ff", "bp")]
    print(
        f"predicted: {args.layers} layers of {args.width}, {args.images} images a step, {args.device}, bf16; ms a step"
    )
    print(f"assumed: {scale.EFFICIENCY:.0%} of peak; {scale.NODE.source}; {scale.NETWORK.source}")
    print("devices " + " ".join(f"{k:>12}" for k in kinds) + "   stages (ff, bp)")
    for row in rows:
        cells = [f"{1e3 * row[k]:12.3f}" if k in row else f"{'-':>12}" for k in kinds]
        print(
            f"{row['devices']:7d} " + " ".join(cells) + f"   {row['ff both, stages']:.0f}, {row['bp both, stages']:.0f}"
        )
    if args.png:
        draw(args, rows)
    return rows


def draw(args, rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for axes, how in zip(figure.subplots(1, 3, sharey=True), ("data", "pipeline", "both"), strict=True):
        for kind, colour in (("ff", "tab:blue"), ("bp", "tab:orange")):
            points = [(r["devices"], 1e3 * r[f"{kind} {how}"]) for r in rows if f"{kind} {how}" in r]
            name = (
                "Forward-Forward" if kind == "ff" else "backpropagation" + (", 1F1B or GPipe" if how != "data" else "")
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
        axes.set(
            xscale="log", yscale="log", xlabel="devices", title={"data": "Data parallel"}.get(how, how.capitalize())
        )
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("ms a step (predicted)")
    figure.suptitle(
        f"Predicted: {args.layers} layers of {args.width}, {args.images} images a step, {args.device}, bf16"
    )
    figure.savefig(args.png, dpi=110)


def worker(args):
    """One rank: rank 0 prints the images a second of all of them, and the stages' shares of the counted cost."""
    import torch
    import torch.distributed as dist

    import ffkernels as ff
    from ffkernels import distributed
    from ffkernels.distributed.layout import counted_costs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.rand(args.batch_size * args.batches, args.sizes[0])
    labels = torch.randint(10, (len(x),))
    net = ff.FFNet.from_sizes(args.sizes, num_classes=10, optimizer=ff.Adam(lr=1e-3), precision=args.precision)
    model, shares = net, [1.0]
    if args.rank_count > 1:
        distributed.start(timeout=300)
    if args.kind == "data":
        model = distributed.DataParallelFF(net, compress=args.compress)
    elif args.kind == "pipeline":
        model = distributed.PipelineFF(net, args.stages or "auto", rows=2 * args.batch_size)
        costs = counted_costs(net.stack, 2 * args.batch_size)
        parts = [sum(costs[s.index] * (s.last - s.first) / s.total for s in spans) for spans in model.stages]
        shares = [part / sum(costs) for part in parts]
    options = {"epochs": 1, "batch_size": args.batch_size, "progress": False}
    model.fit(x[: 2 * args.batch_size], labels[: 2 * args.batch_size], **options)  # warms up
    if args.rank_count > 1:
        dist.barrier()
    speed = torch.tensor([model.fit(x, labels, **options)[0]["rows_per_second"] / 2])
    if args.kind == "copies" and args.rank_count > 1:
        dist.all_reduce(speed)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({"images_per_second": speed.item(), "shares": shares}))
    if args.rank_count > 1:
        distributed.stop()


def run(args, kind, count):
    from ranks import environment, free_port

    command = [sys.executable, __file__, "measure", "--kind", kind, "--worker", str(count), *args.passed]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile("w+") as out:
        ranks = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **common} if count > 1 else {}
            stdout = out if rank == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, env=environment(**own), stdout=stdout))
        try:
            codes = [process.wait(timeout=1800) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(codes):
            raise RuntimeError(f"{count} processes ended with {codes}")
        out.seek(0)
        return json.loads(out.read().splitlines()[-1])


def measure(args):
    from ffkernels.benchmark import scale

    cores = len(os.sched_getaffinity(0))
    cases = [("copies", 1), *((kind, n) for kind in args.kinds for n in args.processes)]
    found, shares = {case: [] for case in cases}, {}
    for _ in range(args.rounds):  # interleaved, so that what changes on the machine changes for all
        for case in cases:
            got = run(args, *case)
            found[case].append(got["images_per_second"])
            shares[case] = got["shares"]
    one = statistics.median(found[cases[0]])
    lines = []
    print(f"measured: {'-'.join(map(str, args.sizes))}, {args.batch_size} images a step, {args.batches} steps,")
    print(f"{args.precision}, one thread a process, {cores} cores, medians of {args.rounds} interleaved rounds")
    print("processes                images/s   ratio  by the model")
    for kind, count in cases:
        speed = statistics.median(found[kind, count])
        line = {"kind": kind, "processes": count, "images_per_second": found[kind, count], "ratio": speed / one}
        if kind == "pipeline":
            line["model"] = scale.pipeline_on_cores(shares[kind, count], cores, args.batches)
        lines.append(line)
        model = f"{line['model']:12.2f}x" if "model" in line else ""
        name = {"copies": "apart" if count > 1 else "", "data": "data parallel"}.get(kind, kind)
        print(f"{count:9d} {name:14s} {speed:9.0f} {speed / one:6.2f}x {model}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("predict", help="step times up to 4,096 GPUs, from counted work and published rates")
    p.add_argument("--layers", type=int, default=64)
    p.add_argument("--width", type=int, default=8192)
    p.add_argument("--images", type=int, default=8192, help="of a global minibatch (default: %(default)s)")
    p.add_argument("--device", default="H100")
    p.add_argument("--png", help="draw the table")
    p.add_argument("--json", help="write every number")
    p = commands.add_parser("measure", help="throughput of a few processes of one thread each, on this machine")
    kinds = ("pipeline", "data", "copies")
    p.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, help="copies: processes that train apart")
    p.add_argument("--processes", type=int, nargs="+", default=[2], help="beside one (default: 2)")
    p.add_argument("--sizes", type=int, nargs="+", default=[784, 2000, 2000, 2000, 2000])
    p.add_argument("--stages", type=int, nargs="+", help="layers of each stage (default: PipelineFF's own division)")
    p.add_argument("--batch-size", type=int, default=1024)
    p.add_argument("--batches", type=int, default=20, help="of an epoch; MNIST has 59 of 1,024")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--precision", default="highest", choices=("highest", "high", "medium"))
    p.add_argument("--compress", default="none", choices=("none", "bf16"))
    p.add_argument("--json", help="write every number")
    p.add_argument("--kind", default="copies", help=argparse.SUPPRESS)
    p.add_argument("--worker", type=int, dest="rank_count", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "predict":
        result = predict(args)
    elif args.rank_count is not None:
        worker(args)
        return
    else:
        args.passed = sys.argv[2:]
        result = measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
