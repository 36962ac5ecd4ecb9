"""The peer's preparation of the same rows, timed in the peer's Python: `peer_prepare.py FOLDER MODEL PROCESSES`."""

import sys
import time

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

folder, path, processes = sys.argv[1:4]
settings = {
    "model_name_or_path": path,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "template": "qwen",
    "dataset_dir": folder,
    "dataset": "short",
    "cutoff_len": 512,
    "preprocessing_num_workers": int(processes),
    "output_dir": f"{folder}/peer-rate-{processes}",
    "report_to": "none",
    "max_steps": 1,
    "use_cpu": True,
}
model, data, training, *_ = get_train_args(settings)
loaded = load_tokenizer(model)
template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
began = time.perf_counter()
get_dataset(template, model, data, training, stage="sft", **loaded)
print(time.perf_counter() - began)
