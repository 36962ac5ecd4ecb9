"""Patterns of known failures in an error or a log: code → regular expression.

`engine.runs.failures` searches for them, `engine/core/sentences/failures.yaml` explains them, and
`engine.runs.remedies` suggests changes to the spec. The order matters: specific patterns come before general ones. A
group named `what` is inserted into the sentence.
"""

from __future__ import annotations

PATTERNS = {
    # ------------------------------------------------------------------------ memory
    "device-memory": r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory",
    "shared-memory": (
        r"insufficient shared memory|out of shared memory"
        r"|unable to (?:open|mmap|write to|allocate) (?:\d+ bytes from )?(?:file </torch_|shared memory)"
        r"|killed by signal: Bus error|/dev/shm.*No space left|No space left on device.*(?:nccl-|/dev/shm|torch_)"
    ),
    "worker-killed": (
        r"DataLoader worker \(pid.*?\) (?:is killed by signal: Killed|exited unexpectedly)"
        r"|BrokenProcessPool"
    ),
    "threads": (
        r"can't start new thread|Thread creation failed|pthread_create failed"
        r"|fork: retry: Resource temporarily unavailable"
    ),
    "host-memory": (
        r"DefaultCPUAllocator: can't allocate memory|DefaultCPUAllocator: not enough memory"
        r"|Cannot allocate memory|\bMemoryError\b|std::bad_alloc"
        r"|ArrowMemoryError"
    ),
    # ------------------------------------------------------------------------ files
    "disk-full": r"No space left on device|Disk quota exceeded|Errno 28",
    "not-writable": r"Permission denied: '(?P<what>[^']+)'|Read-only file system",
    "open-files": r"Too many open files|Errno 24",
    "storage": r"Stale file handle|Errno 116|Input/output error|Errno 5\b|Transport endpoint is not connected",
    # ------------------------------------------------------------------------ cards
    "port": r"EADDRINUSE|[Aa]ddress already in use",
    "kernels": r"no kernel image is available|CUDA capability sm_\d+ is not compatible",
    "driver": r"NVIDIA driver on your system is too old|CUDA driver version is insufficient",
    "driver-lost": (
        r"Driver/library version mismatch|CUDA unknown error"
        r"|no CUDA-capable device is detected|CUDA initialization: .*(?:error|unavailable)"
        r"|forward compatibility was attempted"
    ),
    "card-busy": r"CUDA-capable device\(s\) is/are busy or unavailable",
    "card-fault": (
        r"uncorrectable (?:NVLink|ECC) error|fallen off the bus|GPU is lost"
        r"|Xid \(PCI|CUDA error: hardware stack error|CUDA error: misaligned address"
    ),
    "card-index": r"CUDA error: invalid device ordinal|Invalid device id|device >= 0 && device < num_gpus",
    "token-beyond": (
        r"indexSelectLargeIndex|index out of range in self|srcIndex < srcSelectDimSize"
        r"|`?vocab_size`? .* out of range|t >= 0 && t < n_classes"
    ),
    "device-assert": r"device-side assert triggered",
    "card-access": r"an illegal memory access was encountered|unspecified launch failure",
    "fork-cuda": r"Cannot re-initialize CUDA in forked subprocess",
    "cublas": r"CUBLAS_STATUS_\w+|CUDNN_STATUS_\w+|cuDNN error",
    "nccl-duplicate": r"Duplicate GPU detected",
    "nccl-timeout": (
        r"Watchdog caught collective operation timeout"
        r"|collective operation timeout|Timed out waiting \d+ms for (?:recv|send)"
    ),
    "nccl": r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|ncclRemoteError",
    "unused-parameters": (
        r"Expected to have finished reduction in the prior iteration"
        r"|marked as? ready (?:only once|twice)"
    ),
    "image-features": r"Image features and image tokens do not match",
    # ------------------------------------------------------------------------ libraries
    "bitsandbytes": r"libbitsandbytes|CUDA Setup failed|bitsandbytes.*not.*(?:found|available)"
    r"|Native code method attempted to call|not available in CPU-only version of bitsandbytes",
    "compiler": (
        r"Failed to find C compiler|Python\.h: No such file|InvalidCxxCompiler"
        r"|torch\._inductor\.exc|torch\._dynamo\.exc|BackendCompilerFailed|triton\.compiler"
    ),
    "binaries": (
        r"undefined symbol: \w+|version `[^']+' not found"
        r"|cannot import name '\w+' from '(?:torch|transformers|peft|accelerate|trl)"
    ),
    "attention": (
        r"FlashAttention only support|[Ff]lash_?[Aa]ttention.*(?:not supported|only supports|cannot be used)"
        r"|FlashAttention2 has been toggled on"
        r"|does not support an attention implementation"
    ),
    "determinism": r"does not have a deterministic implementation|CUBLAS_WORKSPACE_CONFIG",
    "precision": (
        r"[Bb][Ff]loat16 is not supported|not implemented for '(?:Half|BFloat16|c10::Half)'"
        r"|bf16.*(?:requires|not supported)|expected scalar type \w+ but found \w+"
        r"|Attempting to unscale FP16 gradients|mat1 and mat2 must have the same dtype"
    ),
    "tracker": (
        r"api_key not configured|wandb: ERROR|wandb\.errors|swanlab.*(?:api key|login)"
        r"|mlflow\.exceptions|Comet(?:\.ml)? .*API key|clearml.*credentials"
    ),
    # ------------------------------------------------------------------------ network and hubs
    "certificate": r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|SSLError",
    "gated": r"GatedRepoError|gated repo|401 Client Error|403 Client Error|Invalid user token",
    "repository": r"RepositoryNotFoundError|RevisionNotFoundError|EntryNotFoundError|404 Client Error",
    "network": (
        r"OfflineModeIsEnabled|LocalEntryNotFoundError|ConnectionError"
        r"|MaxRetryError|Network is unreachable|Temporary failure in name resolution"
        r"|ReadTimeout|ConnectTimeout"
    ),
    "package": (
        r"(?:No module named '?|requires the following packages[^:]*: "
        r"|requires the (?=[\w-]+ (?:library|package)\b))(?P<what>\w[\w-]*)"
    ),
    # ------------------------------------------------------------------------ the spec and the model
    "configuration": r"AssertionError: (?P<what>.*the spec says.*)",
    "nothing-trained": (
        r"element 0 of tensors does not require grad"
        r"|optimizer got an empty parameter list|No parameter.*requires.? gradient"
    ),
    "not-finite": (
        r"probability tensor contains either `inf`, `nan`"
        r"|loss is nan|Non-finite (?:loss|gradient)|nan or inf"
    ),
    "template": r"jinja2\.exceptions|TemplateError|TemplateSyntaxError|chat_template is not set",
    "padding": r"does not have a padding token|no pad_token|pad_token.*(?:None|not set)",
    "remote-code": r"trust_remote_code=True|requires you to execute the .* file in that repo",
    "architecture": r"does not recognize this architecture|Unrecognized model in|Unrecognized configuration class",
    "pickled": r"Weights only load failed|UnpicklingError|PytorchStreamReader failed|invalid load key",
    "weights-cut": (
        r"MetadataIncompleteBuffer|HeaderTooLarge|InvalidHeaderDeserialization"
        r"|incomplete metadata, file not fully covered"
    ),
    "damaged": r"ignore_mismatched_sizes|JSONDecodeError|ClassValidationError|SafetensorError",
    "shapes": r"size mismatch for (?P<what>[\w.]+)",
    "time-limit": r"DUE TO TIME LIMIT|DUE TO PREEMPTION|slurmstepd: error: .*CANCELLED",
}
# Patterns of errors that may have been raised in place of another one: tried last, when nothing else matches.
GENERIC_CODES = ("damaged", "shapes", "configuration", "not-finite", "device-assert", "template")
# Messages after which no process continues: a line in the log is enough, whatever the error itself says. A warning that
# a tracker was not reached, in contrast, explains nothing.
FATAL_PATTERNS = {
    **{
        code: PATTERNS[code]
        for code in (
            "device-memory",
            "shared-memory",
            "worker-killed",
            "disk-full",
            "kernels",
            "driver",
            "card-fault",
            "token-beyond",
            "nccl-duplicate",
            "nccl-timeout",
            "time-limit",
        )
    },
    "bitsandbytes": (
        r"libbitsandbytes_\w+\.so(?:: cannot open| not found)"
        r"|bitsandbytes library load error|CUDA Setup failed"
        r"|bitsandbytes native library functionality but it's not available|Native code method attempted to call"
        r"|not available in CPU-only version of bitsandbytes"
    ),
}
# Messages of a rank when another one has gone. Then the other's end is the cause.
ECHO_PATTERN = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe"
    r"|Socket (?:closed|Timeout)|connectFullMesh failed|remote process exited"
    r"|ncclRemoteError|NCCL error|Gloo.*(?:timeout|failed|error)"
    r"|Timed out waiting \d+ms|DistBackendError|recvValue failed"
)
