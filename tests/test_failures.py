"""Each known way to fail is recognised by what libraries really print, and says what to do, in both languages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import read_object, write_json
from engine.runs import failures, runs
from engine.runs.compare import ABSENT, differences
from engine.runs.failure_signatures import FATAL_PATTERNS, GENERIC_CODES, PATTERNS
from engine.runs.failures import Explanation
from engine.runs.remedies import REMEDIES, remedy
from engine.runs.run import read
from engine.spec.run_spec import RunSpec
from engine.spec.steps import examples_per_step
from tests.past_runs import past_run

# As the libraries print them: code → texts, each the last line of a traceback (type: message) or a line of a log.
PRINTED: dict[str, tuple[str, ...]] = {
    "device-memory": (
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
            "GPU 0 has a total capacity of 79.10 GiB of which 1.05 GiB is free."
        ),
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    "shared-memory": (
        (
            "RuntimeError: DataLoader worker (pid 411) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
        ),
        "RuntimeError: unable to write to file </torch_1234_5678_0>: No space left on device (28)",
    ),
    "worker-killed": (
        "RuntimeError: DataLoader worker (pid 7122) is killed by signal: Killed.",
        "RuntimeError: DataLoader worker (pid(s) 18, 19) exited unexpectedly",
    ),
    "threads": (
        "RuntimeError: can't start new thread",
        "libgomp: Thread creation failed: Resource temporarily unavailable",
    ),
    "host-memory": (
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: "
            "can't allocate memory: you tried to allocate 274877906944 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 512. GiB for an array: MemoryError",
        "MemoryError: ",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ),
    "disk-full": ("OSError: [Errno 28] No space left on device: '/runs/checkpoint-500/model.safetensors'",),
    "not-writable": ("PermissionError: [Errno 13] Permission denied: '/runs/adapter'",),
    "open-files": ("OSError: [Errno 24] Too many open files: '/data/train.arrow'",),
    "storage": (
        "OSError: [Errno 116] Stale file handle",
        "OSError: [Errno 5] Input/output error: '/mnt/models/model-00001-of-00004.safetensors'",
    ),
    "port": (
        (
            "RuntimeError: The server socket has failed to listen on any local network address. "
            "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
        ),
    ),
    "kernels": (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        (
            "UserWarning: NVIDIA GeForce RTX 5090 with CUDA capability "
            "sm_120 is not compatible with the current PyTorch installation."
        ),
    ),
    "driver": ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",),
    "driver-lost": (
        (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). "
            "Error 804: forward compatibility was attempted on non supported HW"
        ),
        "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment",
    ),
    "card-busy": ("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",),
    "card-fault": (
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.",
    ),
    "card-index": ("RuntimeError: CUDA error: invalid device ordinal",),
    "token-beyond": (
        "IndexError: index out of range in self",
        (
            "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1553: indexSelectLargeIndex: "
            "block: [38,0,0], thread: [64,0,0] Assertion `srcIndex < srcSelectDimSize` failed.\n"
            "torch.AcceleratorError: CUDA error: device-side assert triggered"
        ),
    ),
    "device-assert": ("torch.AcceleratorError: CUDA error: device-side assert triggered",),
    "card-access": ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered",),
    "fork-cuda": (
        (
            "RuntimeError: Cannot re-initialize CUDA in forked subprocess. "
            "To use CUDA with multiprocessing, you must use the 'spawn' start method"
        ),
    ),
    "cublas": (
        "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ),
    "nccl-duplicate": (
        (
            "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:77, "
            "invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
        ),
    ),
    "nccl-timeout": (
        (
            "[rank1]:[E1129] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, "
            "OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600029 milliseconds before timing out."
        ),
    ),
    "nccl": (
        (
            "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error, "
            "NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed"
        ),
    ),
    "image-features": (
        "ValueError: Image features and image tokens do not match, tokens: 2, features: 145",
        "ValueError: Image features and image tokens do not match: tokens: 832, features 52",
    ),
    "unused-parameters": (
        "RuntimeError: Expected to have finished reduction in the prior iteration before starting a new one.",
    ),
    "bitsandbytes": (
        "RuntimeError: Configured CUDA binary not found at /venv/bitsandbytes/libbitsandbytes_cuda128.so",
        (
            "OSError: /venv/bitsandbytes/libbitsandbytes_cuda128.so: "
            "cannot open shared object file: No such file or directory"
        ),
    ),
    "compiler": (
        (
            "torch._inductor.exc.InductorError: RuntimeError: Failed to "
            "find C compiler. Please specify via CC environment variable"
        ),
        "fatal error: Python.h: No such file or directory",
    ),
    "binaries": (
        "ImportError: /venv/flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE",
        "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found",
    ),
    "attention": (
        "RuntimeError: FlashAttention only supports Ampere GPUs or newer.",
        "ValueError: FlashAttention2 has been toggled on, but it cannot be used due to the following error",
    ),
    "determinism": (
        (
            "RuntimeError: cumsum_cuda_kernel does not have a deterministic "
            "implementation, but you set 'torch.use_deterministic_algorithms(True)'"
        ),
    ),
    "precision": (
        ("RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'"),
        "ValueError: Attempting to unscale FP16 gradients.",
        "RuntimeError: expected scalar type BFloat16 but found Float",
    ),
    "tracker": (
        "wandb.errors.errors.UsageError: api_key not configured (no-tty). call wandb.login(key=[your_api_key])",
    ),
    "certificate": (
        (
            "requests.exceptions.SSLError: HTTPSConnectionPool(host='huggingface.co', port=443): "
            "(Caused by SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]')))"
        ),
    ),
    "gated": (
        (
            "huggingface_hub.errors.GatedRepoError: 401 Client Error. "
            "Cannot access gated repo for url https://huggingface.co/meta-llama/…"
        ),
    ),
    "repository": ("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.",),
    "network": (
        (
            "requests.exceptions.ConnectionError: HTTPSConnectionPool: Max retries "
            "exceeded (Caused by NameResolutionError: Temporary failure in name resolution)"
        ),
        "httpx.ConnectTimeout: timed out",
    ),
    "package": ("ModuleNotFoundError: No module named 'liger_kernel'",),
    "configuration": ("AssertionError: learning_rate is 0.1 where the spec says 0.2",),
    "nothing-trained": (
        "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn",
        "ValueError: optimizer got an empty parameter list",
    ),
    "not-finite": ("RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",),
    "template": ("jinja2.exceptions.UndefinedError: 'None' has no attribute 'strip'",),
    "padding": ("ValueError: Asking to pad but the tokenizer does not have a padding token.",),
    "remote-code": (
        (
            "ValueError: The repository contains custom code which must be executed to "
            "correctly load the model. Please pass the argument `trust_remote_code=True`"
        ),
    ),
    "architecture": (
        (
            "ValueError: The checkpoint you are trying to load has model "
            "type `new` but Transformers does not recognize this architecture."
        ),
    ),
    "pickled": (
        "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded",
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    ),
    "weights-cut": (
        (
            "safetensors_rust.SafetensorError: Error while deserializing header: "
            "incomplete metadata, file not fully covered"
        ),
        "SafetensorError: Error while deserializing header: HeaderTooLarge",
    ),
    "damaged": ("json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",),
    "shapes": (
        (
            "RuntimeError: Error(s) in loading state_dict: size mismatch for "
            "model.layers.0.self_attn.q_proj.lora_A.default.weight: copying a param"
        ),
    ),
    "time-limit": ("slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-11-29T10:00:00 DUE TO TIME LIMIT ***",),
}
CASES = [(code, text) for code, texts in PRINTED.items() for text in texts]
Failed = Callable[..., Explanation]


@pytest.fixture
def failed(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Failed:
    """What is said of a run that ended with exit code 1, and left this log and this error."""

    def explain(
        log: str = "",
        error: dict | None = None,
        rank: int = 0,
        spec: RunSpec | None = None,
        others: dict[int, str] | None = None,
        begins: dict[str, int] | None = None,
    ) -> Explanation:
        """`others`: the logs of other machines, by their numbers; `begins`: where the attempt begins in them."""
        run = past_run(tmp_path / "saves", spec or make_spec(name="failed"), outcome="failed")
        write_json(run.dir.exit, {"outcome": "failed", "reason": "exit", "code": 1, "signal": None, "ended": 1e9})
        run.dir.log.write_text(log, encoding="utf-8")
        for machine, text in (others or {}).items():
            run.dir.log_of(machine - 1).write_text(text, encoding="utf-8")
        write_json(run.dir.keeper, read_object(run.dir.keeper) | {"logs_from": begins or {}})
        if error:
            write_json(
                run.dir.error,
                {"rank": rank, "at": 1e9, "causes": [], "traceback": "", "problems": []} | error,
            )
        explanation = failures.explain(read(run.path, tmp_path / "saves"))
        assert explanation is not None
        return explanation

    return explain


def error_of(text: str) -> dict[str, str]:
    kind, _, message = text.partition(": ")
    return {"type": kind, "message": message}


def error_with(code: str) -> dict[str, Any]:
    """The error of a library, or the run's own refusal where the code is one of a problem."""
    if code in PRINTED:
        return error_of(PRINTED[code][0])
    values = {"step": "8", "loss": "9.1", "best": "1.2"}
    problems = [{"code": code, "field": "training.learning_rate", "values": values}]
    return {"type": "Refusal", "message": code, "problems": problems}


def test_every_signature_is_tried() -> None:
    assert set(PRINTED) == set(PATTERNS)
    assert len(PATTERNS) >= 30
    assert set(FATAL_PATTERNS) <= set(PATTERNS)
    assert set(GENERIC_CODES) <= set(PATTERNS)


@pytest.mark.parametrize(("code", "text"), CASES)
def test_a_reported_error_is_recognised(failed: Failed, code: str, text: str) -> None:
    why = failed(log="loading…\n", error=error_of(text))
    assert why.code == code
    for language in ("en", "zh"):
        assert len(why.what(language)) > 3
        assert len(why.advice(language)) > 10


@pytest.mark.parametrize(("code", "text"), CASES)
def test_the_first_traceback_of_a_log_is_recognised_where_nothing_was_reported(
    failed: Failed, code: str, text: str
) -> None:
    if (
        "\n" in text
        or ": " not in text
        or text.startswith(("terminate", "NVRM", "slurm", "libgomp", "/", "[rank", "User", "fatal"))
    ):
        pytest.skip("it is printed without a traceback")
    traceback = f'Traceback (most recent call last):\n  File "train.py", line 1, in <module>\n    main()\n{text}\n'
    assert failed(log=f"step 1\n{traceback}and much more\n").code == code


@pytest.mark.parametrize("code", FATAL_PATTERNS)
def test_a_line_that_nobody_survives_explains_another_error(failed: Failed, code: str) -> None:
    log = f"step 1\n{PRINTED[code][-1]}\nstep 2\n"
    assert failed(log=log, error={"type": "RuntimeError", "message": "something went wrong"}).code == code


OTHERWISE = [
    "ValueError: GRPO requires the reward to be a number",
    "ValueError: this requires the model to be loaded in 4 bits",
    "RuntimeError: the port of call is closed",
    "ValueError: no optimizer is that good",
]


@pytest.mark.parametrize("text", OTHERWISE)
def test_what_only_sounds_like_a_known_failure_is_told_as_it_is(failed: Failed, text: str) -> None:
    assert failed(error=error_of(text)).code == "exit"


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("ModuleNotFoundError: No module named 'liger_kernel.transformers'", "liger_kernel"),
        (
            (
                "ImportError: This modeling file requires the following packages that "
                "were not found in your environment: einops. Run `pip install einops`"
            ),
            "einops",
        ),
        ("ImportError: GGUFConfig requires the gguf library but it was not found in your environment.", "gguf"),
    ],
)
def test_the_package_that_is_missing_is_named(failed: Failed, text: str, package: str) -> None:
    why = failed(error=error_of(text))
    assert f"'{package}'" in why.what("en")
    assert f"pip install {package} " in why.advice("en")


@pytest.mark.parametrize(
    "error",
    [{"rank": 0}, {"problems": None}, {"problems": [1, {"code": []}]}, {"causes": 3, "traceback": []}],
)
def test_a_damaged_error_is_no_error_of_the_page(failed: Failed, error: dict) -> None:
    assert failed(error={"type": "ValueError", "message": "x"} | error).what("zh")


def test_an_error_that_nobody_knows_is_told_as_it_is(failed: Failed) -> None:
    why = failed(error={"type": "ValueError", "message": "the furnace is cold"})
    assert why.code == "exit"
    assert "the furnace is cold" in why.what("en")


# As torch's launcher prints it when rank 1 was killed, and rank 0 noticed.
SUMMARY = """
============================================================
engine.worker.train FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-29_10:05:12
  host      : node
  rank      : {other} (local_rank: {other})
  exitcode  : {other_code} (pid: 4711)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_10:05:11
  host      : node
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 4712)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4712
============================================================
"""
ECHOES = (
    (
        "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] "
        "Connection closed by peer [127.0.1.1]:51433"
    ),
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection reset by peer [10.0.0.2]:4822",
    (
        "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 0. ncclRemoteError: "
        "A call failed possibly due to a network error or a remote process exiting prematurely."
    ),
)


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("first", [True, False])
def test_a_killed_rank_is_the_cause_and_not_what_the_others_say_of_it(failed: Failed, echo: str, first: bool) -> None:
    killed, left = {"rank": 1, "code": -9}, {"rank": 0, "code": 1}
    root, other = (killed, left) if first else (left, killed)
    log = SUMMARY.format(**root, other=other["rank"], other_code=other["code"])
    why = failed(log=log, error=error_of(echo))
    assert why.code == "rank-killed"
    assert "rank 1" in why.what("en")
    assert "SIGKILL" in why.what("en")


def test_the_cause_is_found_in_the_log_of_the_machine_where_the_first_rank_failed(
    failed: Failed, make_spec: Callable[..., RunSpec]
) -> None:
    """Rank 1 is on the second machine; the first only sees that it has gone, a second later."""
    own = SUMMARY.replace("10:05:11", "10:05:12").format(rank=0, code=1, other=2, other_code=-15)
    killed = SUMMARY.format(rank=1, code=-9, other=3, other_code=-15)
    why = failed(log=own, error=error_of(ECHOES[0]), others={2: killed})
    assert (why.code, why.values["rank"], why.values["signal"]) == ("rank-killed", 1, "SIGKILL")
    # Without an error of any rank: what this attempt has printed there, and not what the first machine says of it.
    earlier = "Traceback (most recent call last):\n  File z\nMemoryError: \n"
    cause = f"Traceback (most recent call last):\n  File x\n{PRINTED['device-memory'][0]}\n"
    echo = f"Traceback (most recent call last):\n  File y\n{ECHOES[0]}\n"
    gone = SUMMARY.replace("10:05:12", "10:05:10").replace("10:05:11", "10:05:10")
    gone = gone.format(rank=3, code=1, other=1, other_code=-15)
    why = failed(
        log=echo + own,
        spec=make_spec(name="other"),
        others={2: "", 3: f"{earlier}{cause}{gone}"},
        begins={"log-3.txt": len(earlier)},
    )
    assert why.code == "device-memory"
    assert why.traceback.startswith(cause.rstrip())


def test_an_error_of_its_own_is_the_cause_even_where_another_rank_was_killed(failed: Failed) -> None:
    log = SUMMARY.format(rank=0, code=1, other=1, other_code=-9)
    assert failed(log=log, error=error_of("IndexError: index out of range in self")).code == "token-beyond"


def test_what_the_launcher_ends_itself_was_killed_by_nobody(failed: Failed) -> None:
    log = SUMMARY.format(rank=0, code=1, other=1, other_code=-15)
    assert failed(log=log, error=error_of(ECHOES[0])).code == "exit"


def test_a_finished_run_has_no_reason(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> None:
    run = past_run(tmp_path, make_spec(name="good"))
    run.dir.log.write_text(json.dumps(PRINTED), encoding="utf-8")
    assert failures.explain(runs.read(run.path, tmp_path)) is None


# ------------------------------------------------------------------------------------------ what would have helped

Q8 = {"model__quantization": {"kind": "8bit"}, "training__optim": "paged_adamw_8bit"}
BATCH = {"training__per_device_train_batch_size": 6, "training__gradient_checkpointing": True}
HELP: list[tuple[str, dict[str, object], dict[str, object]]] = [  # code, settings before, settings after
    ("device-memory", {"training__gradient_checkpointing": False}, {"training.gradient_checkpointing": True}),
    ("device-memory", BATCH, {"training.per_device_train_batch_size": 3, "training.gradient_accumulation_steps": 2}),
    (
        "device-memory",
        BATCH | {"training__per_device_train_batch_size": 5},
        {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 5},
    ),
    ("device-memory", BATCH | {"training__per_device_train_batch_size": 1}, {"model.quantization.kind": "4bit"}),
    (
        "device-memory",
        BATCH | {"training__per_device_train_batch_size": 1, "hardware": {"device": "cuda", "num_processes": 2}},
        {"hardware.strategy.kind": "fsdp2"},
    ),
    (
        "device-memory",
        BATCH
        | {
            "training__per_device_train_batch_size": 1,
            "hardware": {"num_processes": 4, "num_machines": 2, "strategy": {"kind": "fsdp2", "sharding": "hybrid"}},
        },
        {"hardware.strategy.sharding": "full"},
    ),
    (
        "device-memory",
        BATCH | {"training__per_device_train_batch_size": 1, "method": {"kind": "full"}, "data__max_length": 4096},
        {"data.max_length": 2048},
    ),
    ("worker-killed", {"extra": {"dataloader_num_workers": 8}}, {"extra": {"dataloader_num_workers": 0}}),
    ("host-memory", {"data__preprocessing_num_workers": 16}, {"data.preprocessing_num_workers": 1}),
    ("attention", {"model__attn_implementation": "flash_attention_2"}, {"model.attn_implementation": "auto"}),
    ("card-access", {}, {"model.attn_implementation": "eager"}),
    ("bitsandbytes", Q8, {"model.quantization.kind": "none", "training.optim": "adamw_torch"}),
    ("precision", {"training__precision": "fp16"}, {"training.precision": "auto"}),
    ("not-finite", {"training__precision": "fp16"}, {"training.precision": "bf16"}),
    ("not-finite", {"training__precision": "bf16", "training__learning_rate": 1e-3}, {"training.learning_rate": 1e-4}),
    ("loss-not-finite", {"training__precision": "fp16"}, {"training.precision": "bf16"}),
    ("loss-diverged", {"training__learning_rate": 1e-3}, {"training.learning_rate": 1e-4}),
    ("compiler", {"extra": {"torch_compile": True, "adam_beta2": 0.9}}, {"extra": {"adam_beta2": 0.9}}),
    ("determinism", {"extra": {"full_determinism": True}}, {"extra": {}}),
    ("tracker", {"logging__report_to": ["wandb"]}, {"logging.report_to": []}),
    ("token-beyond", {}, {"model.resize_embeddings": True}),
    ("unused-parameters", {}, {"extra": {"ddp_find_unused_parameters": True}}),
    ("card-index", {"hardware__devices": [7]}, {"hardware.devices": []}),
    ("fork-cuda", {"extra": {"dataloader_num_workers": 2}}, {"extra": {}}),
]


@pytest.mark.parametrize(("code", "before", "after"), HELP)
def test_a_change_that_would_have_helped_is_offered(
    failed: Failed, make_spec: Callable[..., RunSpec], tmp_path: Path, code: str, before: dict, after: dict
) -> None:
    spec = make_spec(name="failed", **before)
    failed(error=error_with(code), spec=spec)
    changed = remedy(runs.find(tmp_path / "saves")[0])
    assert changed is not None
    # A kind of quantization has settings of its own, which the other lacks.
    paths = {difference.path for difference in differences([spec, changed]) if ABSENT not in difference.values}
    assert paths == {path.removesuffix(".kind") for path in after}
    for path, value in after.items():
        held = changed.model_dump()
        for step in path.split("."):
            held = held[step]
        assert held == value
    assert examples_per_step(changed) == examples_per_step(spec)


@pytest.mark.parametrize("code", ["disk-full", "driver", "nccl-timeout", "fork-cuda", "tracker", "compiler"])
def test_where_no_setting_would_help_none_is_changed(failed: Failed, tmp_path: Path, code: str) -> None:
    failed(error=error_of(PRINTED[code][0]))
    assert remedy(runs.find(tmp_path / "saves")[0]) is None


def test_every_remedy_is_tried() -> None:
    assert {code for code, *_ in HELP} | {"cublas", "shared-memory", "threads"} == set(REMEDIES)
