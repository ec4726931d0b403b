"""Keys of a config.json that nobody reads: which are harmless, and which change what a network computes.

Every key is either read or checked by its family (`READ` of the format, and its CONFIG_KEYS and CHOICES), harmless, or
unknown. An unknown one with a value that switches nothing on is passed over; one whose name tells of the computation
is refused; others are named in a warning. None is ignored without a word.
"""

import re
from collections.abc import Iterable
from typing import Any

from bd3lm_jax.checkpoints.published.mapping import OBJECTIVE_KEY, require
from bd3lm_jax.core import log

HARMLESS = frozenset("""
    model_type architectures auto_map transformers_version transformers.js_config _name_or_path name_or_path
    _attn_implementation attn_implementation _commit_hash tokenizer_class unsloth_version unsloth_fixed license library
    dtype torch_dtype use_bfloat16 torchscript use_cache return_dict gradient_checkpointing precision init_device
    is_llama_config init_fn initializer_range initializer_cutoff_factor init_std init_cutoff_factor initializer_factor
    pretraining_tp flash_attention deterministic_flash_attn reference_compile repad_logits_with_grad rope_full_precision
    reorder_and_upcast_attn use_flash_attn use_flash_attention_2 softmax_in_fp32
    bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id unk_token_id mask_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id
    attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop
    residual_dropout embedding_dropout mlp_dropout output_dropout dropout classifier_dropout summary_first_dropout
    classifier_pooling summary_activation summary_proj_to_labels summary_type summary_use_proj
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type directionality
    sparse_prediction sparse_pred_ignore_index output_router_logits router_aux_loss_coef aux_loss_alpha
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores output_attentions output_hidden_states return_dict_in_generate output_past
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
    finetuning_task id2label label2id num_labels problem_type task_specific_params chunk_size_feed_forward
    tf_legacy_loss language
    original_max_position_embeddings n_ctx alibi_bias_max attention_layer_norm_with_affine max_window_layers
""".split())
CHANGES_COMPUTATION = re.compile(
    "scal|multipli|softcap|rope|rotary|alibi|window|bias|norm|expert|moe|attn|attention|quant"
    "|compress|layer|head|act|shift|clip|residual|embed|text_config|vision|audio|position|sparse|mup"
    "|encoder_decoder")
NEUTRAL = (None, False, "", [], {}, ())
QUANTISED = ("quantization_config", "quantisation_config", "compression_config")
QUANTISED_TENSORS = (".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".weight_scale_inv", ".weight_scale",
                     ".weight_packed", ".weight_format")
TAKE_UNQUANTISED = "take the release of the model that is not quantised, or a GGUF file of it"


def check_unread(path, published: dict, read: Iterable[str]) -> None:
    """UserError for a key that changes the computation and is not among those that are `read`; a warning that names
    other unknown ones."""
    allowed_keys = HARMLESS | {OBJECTIVE_KEY, *read}
    unknown = {
        key: value
        for key, value in published.items() if key not in allowed_keys and not _is_neutral(key, value)
    }
    for key, value in unknown.items():
        require(
            not CHANGES_COMPUTATION.search(key), f"{path}: '{key}' is {value!r:.80}, which may change what the network "
            f"computes and is not known for model_type '{published['model_type']}': remove it where you know that "
            "it changes nothing")
    if unknown:
        log.note_once(f"{path}: unknown keys are not read: {', '.join(sorted(unknown))}")


def _is_neutral(key: str, value: Any) -> bool:
    """Whether it switches nothing on, or multiplies by one."""
    one = type(value) in (int, float) and value == 1
    return value in NEUTRAL or one and re.search("scal|multipli", key) is not None


def check_quantised(path, published: dict, names: Iterable[str]) -> None:
    """UserError for a checkpoint whose weights are quantised, by its config or by the names of its tensors."""
    for key in QUANTISED:
        quantisation = published.get(key)
        if quantisation not in NEUTRAL:
            method = quantisation
            if isinstance(quantisation, dict):
                method = quantisation.get("quant_method", quantisation.get("format", "?"))
            require(False, f"{path}: this checkpoint is quantised ('{key}' says {method!r}), and quantised safetensors "
                    f"are not read: {TAKE_UNQUANTISED}")
    found = next((name for name in names if name.endswith(QUANTISED_TENSORS)), None)
    require(found is None, f"{path}: this checkpoint is quantised (tensor {found}), and quantised safetensors are not "
            f"read: {TAKE_UNQUANTISED}")
