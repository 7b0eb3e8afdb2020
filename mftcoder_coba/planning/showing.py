"""The lines of `plan`."""

from __future__ import annotations

from collections.abc import Mapping

from mftcoder_coba.config import Config
from mftcoder_coba.planning.cluster import Cluster, ClusterPlan
from mftcoder_coba.planning.memory import GIB, USABLE, GpuMemory, Sharing
from mftcoder_coba.planning.traffic import Traffic

INDENT = " " * 12


def cluster_lines(config: Config, cluster: Cluster, plan: ClusterPlan, total_steps: int | None, validation_rows: int | None) -> list[str]:
    """Args:
    total_steps: of the run; None where it is not known. validation_rows: of a full validation; None likewise.
    """
    size, row = plan.size, plan.row
    quantised = f", {size.quantised:,} of them in 4 bits" if size.quantised else ""
    where = f"{cluster.gpus} GPUs" + (f" on {-(-cluster.gpus // cluster.gpus_per_node)} machines" if cluster.gpus > cluster.gpus_per_node else "")
    return [
        f"model       {size.total:,} parameters, {size.trainable:,} trained{quantised}; {size.layers} layers, attention {plan.attention}",
        *_memory_lines(config, cluster, plan, where),
        f"compute     {plan.step_flops:.3g} FLOPs a step and GPU, full rows; a row's forward pass {row.forward_flops + row.output_flops:.3g}",
        f"balancer    {config.balancer.kind}: {plan.cost.flops:.3g} FLOPs an observation and GPU, one every {plan.cost.interval} steps: "
        f"{plan.balancer_share:.1%} of a step's",
        *_traffic_lines(plan.traffic, plan.sharing),
        *_time_lines(config, cluster, plan, total_steps, validation_rows),
    ]


def _memory_lines(config: Config, cluster: Cluster, plan: ClusterPlan, where: str) -> list[str]:
    rows, memory = config.training.micro_batch_rows, plan.memory
    now, other = ("with", "without") if config.model.gradient_checkpointing else ("without", "with")
    fits = "fits" if memory.peak <= cluster.limit else "does NOT fit"
    lines = [
        f"memory      GiB of one GPU; {_named(plan.sharing)} on {where}, micro-batches of {rows} rows x {config.data.sequence_length} tokens",
        f"{INDENT}{_kinds(memory)}",
        f"{INDENT}activations are {now} checkpointing; {other} it they would be {_gib(plan.other_activations)}",
        f"{INDENT}peak {_gib(memory.peak)} = all of these together, or {_gib(memory.at_step)} at the optimizer's step",
        f"{INDENT}of {cluster.memory_gib:g}, {USABLE:.0%} usable beside CUDA, NCCL and fragments: {fits}",
    ]
    if memory.states.host:
        lines.append(f"{INDENT}offloaded: {_gib(memory.states.host)} of the machine's memory for each GPU")
    if plan.fit is None:
        lines.append("fits        no ZeRO stage fits, not even 3 with offload: fewer rows or tokens, checkpointing, an adapter, or more GPUs")
    else:
        sharing = Sharing.of(plan.fit[0], cluster.gpus, plan.sharing.number_bytes)
        lines.append(f"fits        the smallest stage that fits is {_named(sharing)}: peak {_gib(plan.fit[1].peak)} (--suggest FILE writes it)")
    largest = "not even one row fits" if plan.micro_rows is None else f"the largest micro-batch that fits has {plan.micro_rows} rows"
    return [*lines, f"{INDENT}with the config's {_named(plan.sharing)} {largest} (training.micro_batch_rows)"]


def _traffic_lines(traffic: Mapping[int, Traffic], sharing: Sharing) -> list[str]:
    lines = [f"traffic     bytes that one GPU sends in a step, rings, {_named(sharing)}; the global batch grows where it has too few rows"]
    lines.append(f"{INDENT}{'GPUs':>5} {'gradients':>10} {'weights':>10} {'counts':>10} {'sums+check':>10} {'stop flag':>10} {'balancer':>10}")
    for gpus, sent in traffic.items():
        cells = (sent.gradients, sent.weights, sent.counts, sent.sums, sent.stop_flag, sent.balancer)
        lines.append(f"{INDENT}{gpus:>5} " + " ".join(f"{_bytes(cell):>10}" for cell in cells))
    return lines


def _time_lines(config: Config, cluster: Cluster, plan: ClusterPlan, total_steps: int | None, validation_rows: int | None) -> list[str]:
    speed = cluster.peak_tflops * 1e12 * cluster.utilisation
    step = (plan.step_flops + plan.cost.flops / plan.cost.interval) / speed
    sending = plan.traffic[cluster.gpus].total / (cluster.bandwidth_gb * 1e9)
    lines = [
        f"time        an estimate: {step:.2f} s a step = FLOPs / ({cluster.peak_tflops:g} TFLOP/s x utilisation {cluster.utilisation:g}); "
        f"traffic takes {sending:.2f} s at {cluster.bandwidth_gb:g} GB/s, hidden or not"
    ]
    if total_steps is None:
        return [*lines, f"{INDENT}of the whole run: only with data, or training.max_steps"]
    hours, told = total_steps * step / 3600, f"{total_steps:,} steps"
    if validation_rows is not None:
        times = total_steps // config.validation.every_steps + 1
        hours += times * validation_rows / cluster.gpus * (plan.row.forward_flops + plan.row.output_flops) / speed / 3600
        told += f" and {times} validations of {validation_rows:,} rows"
    return [*lines, f"{INDENT}{told}: {hours:.1f} hours of computing, {hours * cluster.gpus:,.0f} GPU hours"]


def _kinds(memory: GpuMemory) -> str:
    states = memory.states
    kinds = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations": memory.activations,
        "loss": memory.loss,
        "gathered weights": memory.gathered,
        "communication": memory.buffers,
    }
    return ", ".join(f"{kind} {_gib(value)}" for kind, value in kinds.items())


def _named(sharing: Sharing) -> str:
    return f"ZeRO-{sharing.stage}" + (" + offload" if sharing.offload_optimizer or sharing.offload_parameters else "")


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"
