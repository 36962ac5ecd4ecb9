"""Facts of model folders: which there are, what is wrong with one, what can be trained in it."""

import json
import os
import struct
import time

import pytest

from engine.models import discovery, trainable_modules
from engine.models.checks import model_problems
from engine.models.discovery import find_gguf, find_models, is_hub_id
from engine.models.facts import inspect_model
from engine.models.trainable_modules import lora_problems, trainable_parameters
from tests.preloaded import run_python

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def layer(number):
    start = f"model.layers.{number}"
    return {
        f"{start}.self_attn.q_proj.weight": (16, 16),
        f"{start}.self_attn.q_proj.bias": (16,),
        f"{start}.self_attn.k_proj.weight": (8, 16),
        f"{start}.self_attn.k_proj.bias": (8,),
        f"{start}.self_attn.v_proj.weight": (8, 16),
        f"{start}.self_attn.v_proj.bias": (8,),
        f"{start}.self_attn.o_proj.weight": (16, 16),
        f"{start}.mlp.gate_proj.weight": (40, 16),
        f"{start}.mlp.up_proj.weight": (40, 16),
        f"{start}.mlp.down_proj.weight": (16, 40),
        f"{start}.input_layernorm.weight": (16,),
        f"{start}.post_attention_layernorm.weight": (16,),
    }


QWEN = {
    "model.embed_tokens.weight": (96, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (96, 16),
    **layer(0),
    **layer(1),
    **layer(2),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def safetensors(path, shapes, dtype="BF16", size=2):
    """A file as safetensors writes it: length of the header, header, values; all of them zero."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        count = size
        for side in shape:
            count *= side
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    head = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))


def make_model(folder, shapes=QWEN, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    if shapes:
        safetensors(folder / "model.safetensors", shapes)
    return folder


def codes(*arguments, **more):
    return [problem.code for problem in model_problems(*arguments, **more)]


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty hub cache: what the machine running the tests has downloaded is no part of them."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


# -------------------------------------------------------------------------------------------- facts


def test_a_sound_model_tells_its_facts(root):
    model = inspect_model(make_model(root / "Qwen" / "tiny"))
    assert (model.name, model.model_type, model.architecture) == ("tiny", "qwen2", "Qwen2ForCausalLM")
    assert model.parameters == 96 * 16 * 2 + 16 + 3 * (16 * 16 * 2 + 8 * 16 * 2 + 40 * 16 * 3 + 32 + 32)
    assert (model.context_length, model.vocab_size, model.hidden_size, model.layers) == (512, 96, 16, 3)
    assert model.dtype == "bfloat16"
    assert model.bytes > model.parameters * 2
    assert model.has_chat_template
    assert (model.quantized, model.needs_remote_code, model.adapter_of) == (None, False, None)
    assert model_problems(root / "Qwen" / "tiny", [root]) == []


def test_facts_under_older_and_nested_names_are_found(root):
    gpt = make_model(root / "gpt", n_positions=1024, n_embd=8, max_position_embeddings=None, hidden_size=None)
    assert (inspect_model(gpt).context_length, inspect_model(gpt).hidden_size) == (1024, 8)
    folder = root / "vision"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": CONFIG}))
    assert (inspect_model(folder).layers, inspect_model(folder).dtype) == (3, "bfloat16")


@pytest.mark.parametrize(
    "written",
    [
        {"layers_block_type": ["mamba", "moe", "attention"]}, {"text_config": {"layer_types": ["full_attention"] * 3}},
        {"hybrid_override_pattern": "M*E"}, {"decoder_layers": 3, "layer_types": ["x"]},
    ],
)  # fmt: skip
def test_layers_that_are_listed_are_counted(root, written):
    folder = root / "listed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nemotron_h"} | written))
    assert inspect_model(folder).layers == 3


def test_without_a_word_on_the_type_the_weights_tell_it(root):
    assert inspect_model(make_model(root / "old", dtype=None)).dtype == "bfloat16"


def test_a_chat_template_may_be_a_file_of_its_own(root):
    folder = make_model(root / "m")
    (folder / "tokenizer_config.json").write_text("{}")
    assert not inspect_model(folder).has_chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_model(folder).has_chat_template


def test_shards_are_counted_together(root):
    folder = make_model(root / "m", shapes=None)
    shard(folder, "model-1.safetensors", layer(0))
    shard(folder, "model-2.safetensors", layer(1))
    assert inspect_model(folder).parameters == inspect_model(make_model(root / "n", layer(0))).parameters * 2


def shard(folder, name, shapes):
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    index.write_text(json.dumps({"weight_map": places | dict.fromkeys(shapes, name)}))
    safetensors(folder / name, shapes)


def test_a_head_saved_although_it_is_tied_counts_once(root):
    tied = inspect_model(make_model(root / "tied", tie_word_embeddings=True))
    assert tied.parameters == inspect_model(make_model(root / "untied")).parameters - 96 * 16


def test_weights_that_bitsandbytes_packed_have_their_true_shape(root):
    folder = make_model(root / "m", shapes=None, quantization_config={"quant_method": "bitsandbytes"})
    state = json.dumps({"quant_type": "nf4", "shape": [40, 16]}).encode()
    name = "model.layers.0.mlp.up_proj.weight"
    entries = {
        name: {"dtype": "U8", "shape": [320, 1], "data_offsets": [0, 320]},
        f"{name}.absmax": {"dtype": "U8", "shape": [10], "data_offsets": [320, 330]},
        f"{name}.quant_state.bitsandbytes__nf4": {
            "dtype": "U8",
            "shape": [len(state)],
            "data_offsets": [330, 330 + len(state)],
        },
    }
    head = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(330) + state)
    model = inspect_model(folder)
    assert model.parameters == 640
    assert trainable_parameters(model, "lora", r=2) == 2 * 56
    assert model_problems(folder, [root]) == []


@pytest.mark.parametrize(
    ("model_type", "code"), [("qwen2_audio", "model-with-senses"), ("a_family_of_tomorrow", "model-unknown")]
)
def test_a_model_that_transformers_loads_as_none_that_writes_is_refused(root, model_type, code):
    config = {"architectures": ["XForConditionalGeneration"], "model_type": model_type}
    parts = {"audio_config": {"model_type": "y"}}
    assert codes(make_model(root / "hears", **config, **parts), [root]) == [code]


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "proportional"},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "proportional",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "full_attention, sliding_attention",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, None),
    ],
)
def test_a_stretched_context_is_a_fact(root, given, own):
    assert inspect_model(make_model(root / "m", **given)).rope == own


# ------------------------------------------------------------------------------------------ finding


def test_models_are_found_below_the_roots_and_nothing_else_is(root):
    make_model(root / "Qwen" / "tiny")
    make_model(root / "b")
    make_model(root / "1" / "2" / "3" / "4")
    make_model(root / "1" / "2" / "3" / "x" / "too-deep")
    make_model(root / ".hidden")
    make_model(root / "clip", architectures=["CLIPModel"])
    (root / "no-model").mkdir()
    (root / "no-model" / "config.json").write_text('{"theme": "dark"}')
    assert [model.name for model in find_models([root])] == ["1/2/3/4", "b", "Qwen/tiny"]


def test_folders_with_gguf_alone_are_listed_apart(root, tmp_path):
    for name in ("org/packed", "sees", ".hidden", "both", "1/2/3/x/too-deep"):
        (root / name).mkdir(parents=True)
        (root / name / "model-q8_0.gguf").write_bytes(b"GGUF")
    (root / "both" / "config.json").write_text("{")
    (root / "sees" / "model-q8_0.gguf").rename(root / "sees" / "mmproj-q8_0.gguf")
    (root / "again").symlink_to(root / "org")
    (root / "out").symlink_to(tmp_path)
    assert [folder for _, folder in find_gguf([root])] == [root / "org" / "packed"]
    assert [model.name for model in find_models([root])] == ["both"]
    assert find_gguf([root / "org" / "packed"]) == [("packed", root / "org" / "packed")]


def test_a_root_may_itself_be_a_model_or_not_be_there(root):
    make_model(root / "m")
    assert [model.name for model in find_models([root / "m", root / "nowhere"])] == ["m"]


def test_a_model_with_a_broken_config_is_listed_so_that_somebody_repairs_it(root):
    (make_model(root / "m") / "config.json").write_text("{")
    assert [(model.name, model.model_type) for model in find_models([root])] == [("m", "")]


def test_links_are_followed_inside_the_roots_and_never_out_of_them(root, tmp_path):
    make_model(root / "real")
    (root / "again").symlink_to(root / "real")
    (root / "round").symlink_to(root)
    make_model(tmp_path / "outside" / "secret")
    (root / "way-out").symlink_to(tmp_path / "outside")
    assert len(find_models([root])) == 1
    assert codes(root / "way-out" / "secret", [root]) == ["model-outside-roots"]
    assert codes(root / "again", [root]) == []


def test_models_in_the_hubs_cache_are_found_at_the_revision_main_points_to(root, hub):
    repository = hub / "models--Qwen--tiny"
    make_model(repository / "snapshots" / "aaa")
    make_model(repository / "snapshots" / "bbb", max_position_embeddings=99)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa")
    os.utime(repository / "snapshots" / "aaa", (1, 1))
    (found,) = find_models([root])
    assert (found.name, found.context_length) == ("Qwen/tiny", 512)
    assert model_problems(found.path, [root]) == []
    (repository / "refs" / "main").unlink()
    assert find_models([root])[0].context_length == 99


def test_the_hubs_cache_is_where_its_own_variables_say(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert discovery.hub_cache() == tmp_path / "hub"


def test_hundreds_of_models_are_found_in_a_moment(root):
    for number in range(300):
        make_model(root / str(number))
    start = time.process_time()
    assert len(find_models([root])) == 300
    assert time.process_time() - start < 6


# ------------------------------------------------------------------------------- what can be wrong


def test_hub_ids_are_recognised_by_their_form():
    for good in ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "a/b"]:
        assert is_hub_id(good)
    for bad in [
        "gpt2",
        "a/b/c",
        "/a/b",
        "../b",
        "a/..",
        "a/b;rm",
        "a/b\n",
        "a/b.",
        "组织/模型",
        "a--b/c",
        "",
    ]:
        assert not is_hub_id(bad)


def test_a_hub_id_is_no_problem_here(root):
    assert codes("Qwen/Qwen3-8B", [root]) == []


def test_a_folder_below_a_root_goes_before_a_hub_id(root):
    (make_model(root / "Qwen" / "tiny") / "tokenizer.json").unlink()
    assert codes("Qwen/tiny", [root]) == ["model-no-tokenizer"]


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("", "model-empty"),
        ("  ", "model-empty"),
        ("m; rm -rf /", "model-path-characters"),
        ("$(id)", "model-path-characters"),
        ("m\nx", "model-path-characters"),
        ("m\0x", "model-path-characters"),
        ("m\ud800", "model-path-characters"),
        ("--help", "model-path-characters"),
        ("~/m", "model-path-characters"),
        ("../../etc", "model-path-dots"),
        ("/x/" + "y" * 300, "model-path-long"),
        ("/etc/passwd", "model-outside-roots"),
        ("/", "model-outside-roots"),
    ],
)
def test_strange_names_get_a_clear_sentence(root, given, code):
    (found,) = model_problems(given, [root])
    assert (found.code, found.field) == (code, "model.model_name_or_path")
    assert all(found.text(language).isprintable() for language in ("en", "zh"))


def test_names_with_spaces_and_chinese_letters_are_fine(root):
    assert codes(str(make_model(root / "我的 模型")), [root]) == []


def test_a_slip_in_the_name_is_told_with_the_nearest_names(root):
    make_model(root / "Qwen" / "Qwen3-8B")
    (found,) = model_problems(root / "Qwen" / "qwen3-8b-", [root])
    assert found.code == "model-missing"
    assert "Qwen/Qwen3-8B" in found.text()
    assert codes(root / "zzz", [root]) == ["model-missing-alone"]


def test_a_slip_in_config_json_is_told_with_its_place(root):
    (make_model(root / "m") / "config.json").write_text('{\n "model_type": qwen2\n}')
    (found,) = model_problems(root / "m", [root])
    assert (found.code, found.values["line"], found.values["column"]) == ("model-json-broken", 2, 16)


@pytest.mark.parametrize("text", [b"[]", b"\xff\xfe{", b"[" * 100_000, b"9" * 10_000, b""])
def test_config_json_may_hold_anything(root, text):
    (make_model(root / "m") / "config.json").write_bytes(text)
    assert codes(root / "m", [root])[0].startswith("model-json-")
    inspect_model(root / "m")


def test_config_json_may_hold_any_types(root):
    config = {key: [{"a": []}] for key in [*CONFIG, "auto_map", "text_config", "quantization_config"]}
    folder = make_model(root / "m", **config)
    assert inspect_model(folder).vocab_size is None
    model_problems(folder, [root])


def test_a_missing_shard_is_named(root):
    folder = make_model(root / "m", shapes=None)
    shard(folder, "model-1.safetensors", layer(0))
    shard(folder, "model-2.safetensors", layer(1))
    (folder / "model-2.safetensors").unlink()
    (found,) = model_problems(folder, [root])
    assert (found.code, found.values["missing"], found.values["of"]) == (
        "model-shards-missing",
        "model-2.safetensors",
        2,
    )
    assert inspect_model(folder).parameters is None


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../../x.safetensors"}}', "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_cannot_lead_out_of_the_folder(root, index):
    (make_model(root / "m", shapes=None) / "model.safetensors.index.json").write_text(index)
    assert codes(root / "m", [root]) == ["model-index-broken"]


def test_a_file_that_was_cut_short_is_told_with_both_sizes(root):
    file = make_model(root / "m") / "model.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 100)
    (found,) = model_problems(root / "m", [root])
    assert (found.code, found.values["size"], found.values["expected"]) == (
        "model-file-size",
        whole - 100,
        whole,
    )
    os.truncate(file, 50)
    assert codes(root / "m", [root]) == ["model-file-size"]


def test_a_repaired_file_is_read_again(root):
    file = make_model(root / "m") / "model.safetensors"
    os.truncate(file, 50)
    assert codes(root / "m", [root])
    safetensors(file, QWEN)
    assert codes(root / "m", [root]) == []


def framed(header):
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"123",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 0) + b"{}",
        framed(b"not json"),
        framed(b"[" * 200_000),
        framed(b"[1, 2]"),
        framed(b'{"a\\ud800\\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        framed(b'{"a": 1}'),
        framed(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
        framed(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + bytes(4),
        framed(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}') + bytes(4),
        framed(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}') + bytes(4),
        framed(b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        framed(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
    ],
)
def test_a_hostile_header_is_a_problem_and_nothing_worse(root, content):
    (make_model(root / "m") / "model.safetensors").write_bytes(content)
    assert codes(root / "m", [root]) == ["model-header-broken"]
    assert inspect_model(root / "m").parameters is None
    assert trainable_modules.linear_modules(inspect_model(root / "m")) == []


def test_a_header_that_claims_to_be_huge_is_not_read(root):
    file = make_model(root / "m") / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 30))
    os.truncate(file, 1 << 31)  # sparse: takes no room on the disk
    assert codes(root / "m", [root]) == ["model-header-broken"]


def test_a_git_lfs_pointer_is_recognised(root):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (make_model(root / "m") / "model.safetensors").write_text(text)
    assert codes(root / "m", [root]) == ["model-lfs-pointer"]


def test_weights_in_other_forms_are_refused_with_the_way_out(root):
    pickled, gguf, none = (make_model(root / name, shapes=None) for name in ("pickled", "gguf", "none"))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    (gguf / "model-q4.gguf").write_bytes(b"GGUF")
    assert codes(pickled, [root]) == ["model-pickled"]
    assert codes(gguf, [root]) == ["model-gguf"]
    assert codes(gguf / "model-q4.gguf", [root]) == ["model-gguf"]
    assert codes(none, [root]) == ["model-no-weights"]
    assert codes(pickled / "config.json", [root]) == ["model-is-a-file"]
    (none / "config.json").unlink()
    assert codes(none, [root]) == ["model-no-config"]


def test_an_adapter_chosen_as_base_names_its_base(root):
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    (found,) = model_problems(adapter, [root])
    assert found.code == "model-is-adapter"
    assert "Qwen/Qwen3-8B" in found.text()
    assert inspect_model(adapter).adapter_of == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("how", ["gptq", "awq"])
def test_quantized_weights_cannot_be_trained(root, how):
    make_model(root / how, quantization_config={"quant_method": how})
    assert codes(root / how, [root]) == ["model-quantized"]


def test_a_models_own_code_needs_permission_unless_transformers_knows_the_family(root):
    own = make_model(root / "own", model_type="my_own", auto_map={"AutoConfig": "c.C"})
    assert codes(own, [root]) == ["model-remote-code"]
    assert codes(own, [root], allow_remote_code=True) == []
    assert codes(make_model(root / "known", auto_map={"AutoConfig": "c.C"}), [root]) == []


def test_models_of_another_kind_are_told_apart(root):
    scorer = make_model(root / "rm", architectures=["Qwen2ForSequenceClassification"])
    assert codes(scorer, [root]) == ["model-is-scorer"]
    assert codes(scorer, [root], scorer=True) == []
    assert codes(make_model(root / "clip", architectures=["CLIPModel"]), [root]) == ["model-not-language"]
    t5 = make_model(root / "t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    assert codes(t5, [root]) == ["model-encoder-decoder"]


def test_everything_wrong_is_told_at_once(root):
    folder = make_model(root / "m", shapes=None, model_type="my_own", auto_map={"AutoConfig": "c.C"})
    (folder / "tokenizer.json").unlink()
    assert codes(folder, [root]) == ["model-remote-code", "model-no-weights", "model-no-tokenizer"]


# -------------------------------------------------------------------------------- what can be trained


def test_the_linear_layers_are_listed_without_embeddings_and_head(root):
    model = inspect_model(make_model(root / "m"))
    assert trainable_modules.linear_modules(model) == LINEAR
    assert {"model.layers.0.mlp", "model.layers.2.self_attn.q_proj", "lm_head"} <= set(
        trainable_modules.module_names(model)
    )


def test_a_target_that_is_not_there_is_told_with_those_that_are(root):
    model = inspect_model(make_model(root / "m"))
    for good in [["all-linear"], LINEAR, ["layers.0.mlp.up_proj"], ["lm_head"], r".*\.(q|v)_proj"]:
        assert lora_problems(model, good, ["lm_head", "embed_tokens", "model.norm"]) == []
    first, second = lora_problems(model, ["q_porj", "k_proj"], ["lm_haed"])
    assert (first.code, first.field, first.values["nearest"]) == (
        "lora-target-missing",
        "method.target_modules",
        "q_proj",
    )
    assert (second.code, second.field) == ("lora-saved-missing", "method.modules_to_save")
    assert second.values["nearest"] == "lm_head"
    assert [found.code for found in lora_problems(model, "q_proj")] == [
        "lora-target-missing"
    ]  # a pattern for all of it
    assert [found.code for found in lora_problems(model, ["proj"])] == ["lora-target-missing"]
    assert [found.code for found in lora_problems(model, "(")] == ["lora-pattern-broken"]


def test_each_method_trains_what_its_name_says(root):
    model = inspect_model(make_model(root / "m"))
    one_layer = 16 * 16 * 2 + 8 * 16 * 2 + 40 * 16 * 3 + 32 + 32
    assert trainable_parameters(model, "full") == model.parameters
    assert trainable_parameters(model, "freeze", trainable_layers=2) == one_layer * 2
    assert trainable_parameters(model, "freeze", trainable_modules=["model.layers.1", "model.norm"]) == one_layer + 16
    assert trainable_parameters(model, "lora", r=4, target_modules=["q_proj"]) == 3 * 4 * 32
    assert trainable_parameters(model, "lora", r=4, target_modules=["q_proj"], use_dora=True) == 3 * (4 * 32 + 16)


PEFT = """
import json, sys
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
model.save_pretrained(sys.argv[1])
counts = [sum(p.numel() for p in model.parameters())]
for case in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    counts.append(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **case)).get_nb_trainable_parameters()[0])
print(json.dumps(counts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_peft_counts_the_same(root, tied):
    cases = [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 8, "target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
        {"r": 4, "target_modules": r".*\.(up|down)_proj", "use_dora": True},
        {"r": 4, "target_modules": ["v_proj", "up_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp", "norm"]},
        {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ]
    folder = make_model(root / "m", shapes=None, tie_word_embeddings=tied)
    printed = run_python("-c", PEFT, folder, json.dumps(cases))
    model = inspect_model(folder)
    ours = [
        trainable_parameters(model, "full"),
        *(trainable_parameters(model, "lora", **case) for case in cases),
    ]
    assert ours == json.loads(printed.splitlines()[-1])
