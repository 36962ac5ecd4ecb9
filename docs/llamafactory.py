"""Write docs/llamafactory.md and its Chinese counterpart: how to move, and the table of keys, made from
engine/importer/*.yaml. Called by `python -m docs.make`; a test compares them."""

from __future__ import annotations

from collections.abc import Mapping

from engine.importer.table import Entry, Section, reasons, sections

FILES = {"en": "llamafactory.md", "zh": "llamafactory_zh.md"}
HEAD = {
    "en": """# From LLaMA-Factory, in ten minutes

Made by `make docs`; the text stands in `docs/llamafactory.py`, the tables in `engine/importer/*.yaml`.

1. **Data.** Start the studio with the folder that holds your `dataset_info.json`:
   `python app.py --data /path/to/data`. It is read as it is. The Data tab shows
   each row as the model will see it, token by token, with what is trained.
2. **Models.** Name the folder your models lie in: `--models /path/to/models`. A hub id works, too.
3. **Settings.** On the Train tab open *Load settings*, paste what you have, and press *Load into the form*:
   - a command of any shell (`llamafactory-cli train …`, `torchrun …`, `deepspeed …`,
     `accelerate launch …`, `python src/train.py …`), with `\\`, `^` or a backtick at its line
     ends, with variables, comments, redirections; the number of processes and the cards are
     taken from the launcher's flags and from `CUDA_VISIBLE_DEVICES` and `NPROC_PER_NODE`;
   - a YAML file; where a command names one, paste its content below the
     command, and `key=value` behind it goes before it;
   - the form that LLaMA Board saved (`config/*.yaml`, `llamaboard_config.yaml`), or a `training_args.yaml`;
   - an axolotl YAML.

   Below the button stands what was left out or is taken otherwise, each with
   the reason; folded below it what is not needed.
4. **Start.** The card beside the form says what the run would do and what stands in its way. Then press *Start*.

From a shell the same, with files that a command names read from its folder:

    python -m engine import train.sh > spec.yaml    # what is lost is said on standard error
    python -m engine check spec.yaml
    python -m engine train spec.yaml

What a file leaves out is as it was there: learning rate 5e-5, batch 8, no accumulation, a linear schedule, 3
epochs, LoRA rank 8 with twice the alpha, 2048 tokens, all checkpoints kept; in PPO a KL coefficient of 0.2 with
target 6, temperature 0.95, top_p 0.7 and 1024 new tokens. Kept as Athanor has them: a log line every 5 steps, a
checkpoint every 100, and batches of similar length (`group_by_length: false` for those of a plain shuffle).

A file with `do_predict: true` and no `do_train` becomes an evaluation, one with `export_dir` an
export. Save what is shown and run `python -m engine submit FILE`. An adapter that LLaMA-Factory
trained is continued (`model.adapter_path`) or merged by an export as it is; evaluations measure
results of runs made here, so merge it first. Checkpoints of LLaMA-Factory are not resumed.
""",
    "zh": """# 十分钟从 LLaMA-Factory 迁移

由 `make docs` 生成；正文在 `docs/llamafactory.py`，表格在 `engine/importer/*.yaml`。

1. **数据。** 启动时指定存放 `dataset_info.json` 的文件夹：`python app.py --data /path/to/data`，无需修改即可读取。
   “数据”页逐词元显示模型看到的每一行，以及哪些部分参与训练。
2. **模型。** 用 `--models /path/to/models` 指定模型所在文件夹，也可以填写平台上的编号。
3. **设置。** 在“训练”页展开“载入配置”，粘贴已有内容并点击“载入表单”：
   - 任意 shell 的命令（`llamafactory-cli train …`、`torchrun …`、`deepspeed …`、`accelerate launch …`、
     `python src/train.py …`），行末可以是 `\\`、`^` 或反引号，可含变量、注释和重定向；
     进程数与显卡取自启动器参数以及 `CUDA_VISIBLE_DEVICES`、`NPROC_PER_NODE`；
   - YAML 文件；若命令中引用了 YAML，请把其内容粘贴在命令下方，命令后的 `key=value` 优先；
   - LLaMA Board 保存的表单（`config/*.yaml`、`llamaboard_config.yaml`）或 `training_args.yaml`；
   - axolotl 的 YAML。

   按钮下方逐条列出略去的和有差别的设置及原因；不需要的设置折叠在其下。
4. **开始。** 表单旁的卡片说明这次训练会做什么、有什么问题，然后点击“开始”。

在命令行中同样可以，命令引用的文件会从其所在文件夹读取：

    python -m engine import train.sh > spec.yaml    # 略去的设置写到标准错误
    python -m engine check spec.yaml
    python -m engine train spec.yaml

文件中没有写的设置与 LLaMA-Factory 相同：学习率 5e-5、批大小 8、不累积梯度、linear 调度、3 轮、
LoRA 秩 8（alpha 为其两倍）、2048 个词元、保留全部检查点；
PPO 的 KL 系数为 0.2、目标为 6，温度 0.95，top_p 0.7，最多生成 1024 个词元。
以下沿用本系统的默认值：每 5 步记录一次，每 100 步保存检查点，按相近长度组批
（写 `group_by_length: false` 即为普通随机顺序）。

只有 `do_predict: true` 而没有 `do_train` 的文件会变成评测，含 `export_dir` 的会变成导出：保存显示的内容并运行
`python -m engine submit 文件`。LLaMA-Factory 训练的适配器可直接接着训练（`model.adapter_path`）或导出合并；
评测针对本系统训练的结果，因此请先合并。不能从 LLaMA-Factory 的检查点续训。
""",
}
TITLES = {
    "llamafactory": {"en": "LLaMA-Factory's keys", "zh": "LLaMA-Factory 的键"},
    "launchers": {"en": "Launchers", "zh": "启动器"},
    "axolotl": {"en": "axolotl's keys", "zh": "axolotl 的键"},
}
COLUMNS = {"en": "| key | here |\n|---|---|", "zh": "| 键 | 对应 |\n|---|---|"}
NEEDLESS = {"en": "not needed: {why}", "zh": "不需要：{why}"}
WITH = {"en": "with `{part}`", "zh": "与 `{part}` 一起"}


def page(language: str) -> str:
    """The whole page in a language ("en" or "zh") as Markdown."""
    lines = [HEAD[language]]
    for program, title in TITLES.items():
        lines.append(f"## {title[language]}\n")
        for section in sections(program):
            lines += _section(section, language)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, language: str) -> list[str]:
    note = [section.note[language] + "\n"] if section.note else []
    rows = [f"| `{name}` | {_here(entry, language)} |" for name, entry in section.keys.items()]
    return [f"### {section.title[language]}\n", *note, COLUMNS[language], *rows, ""]


def _here(entry: Entry, language: str) -> str:
    """What becomes of a key: where it goes, or why it goes nowhere; and the remark."""
    paths = [_path(kind, path) for kind, path in entry.paths.items() if path and path != "kind"]
    parts = [", ".join(dict.fromkeys(paths))] if paths else []
    if entry.part:
        parts.append(WITH[language].format(part=entry.part))
    if entry.none:
        parts.append(f"— {_reason(entry.none, language)}")
    elif entry.same and not paths:
        parts.append(NEEDLESS[language].format(why=_reason(entry.same, language)))
    if entry.remark:
        parts.append(entry.remark[language])
    return " · ".join(parts).replace("|", "\\|")


def _path(kind: str, path: str) -> str:
    return f"`{path}`" if not kind else f"`{path}` ({kind})"


def _reason(name: str, language: str) -> str:
    return reasons()[name][language]


def pages() -> Mapping[str, str]:
    """File name → text."""
    return {file: page(language) for language, file in FILES.items()}
