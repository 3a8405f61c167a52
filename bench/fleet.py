"""The nodes of the bench, as their heartbeats tell of them: equal, online, every model hot, nothing to load.

Pure values; `direct_nodes` sends them, `decision` hands them to a registry.
"""

from __future__ import annotations

from herd_node.protocol import wire

MODEL = "bench"
#: The same model under another name with many slots, for thousands of slow streams. Every other scenario runs
#: with a number of slots that machines have: what is kept for each slot must not cost what no fleet pays.
WIDE_MODEL = "bench-wide"

_GIB = 1 << 30


def beat(
    node_id: str,
    agent_id: str,
    boot: str,
    seq: int,
    port: int,
    *,
    slots: int = 32,
    wide_slots: int = 256,
    gpu: str = "NVIDIA GeForce RTX 4090",
) -> wire.Heartbeat:
    """One beat of a machine with one GPU and a llama-server."""
    return wire.Heartbeat(
        node_id=node_id,
        agent_id=agent_id,
        boot=boot,
        seq=seq,
        interval_s=5.0,
        agent_version="bench",
        gateway=wire.Gateway(port=port, addresses=("127.0.0.1",)),
        hardware=wire.Hardware(
            os="Linux", arch="x86_64", cores_physical=16, cores_logical=32, memory_bytes=64 * _GIB
        ),
        cpu=wire.Cpu(percent=5.0, load_1m=0.5),
        memory=wire.Memory(
            total_bytes=64 * _GIB, used_bytes=8 * _GIB, available_bytes=56 * _GIB, pressure="normal"
        ),
        disk=wire.Disk(total_bytes=1024 * _GIB, free_bytes=512 * _GIB),
        heat=wire.Heat(state="nominal"),
        gpus=(wire.Gpu(name=gpu, vendor="nvidia", memory_total_bytes=24 * _GIB, memory_used_bytes=8 * _GIB),),
        backends=(wire.Backend(id="llama-server-8080", kind="llama-server", version="bench", ready=True),),
        models=tuple(
            wire.Model(
                name=name,
                backend="llama-server-8080",
                capabilities=("completion", "tools", "vision"),
                state="hot",
                size_bytes=2 * _GIB,
                vram_bytes=2 * _GIB,
                parameters=3_000_000_000,
                slots=count,
            )
            for name, count in ((MODEL, slots), (WIDE_MODEL, wide_slots))
        ),
    )
