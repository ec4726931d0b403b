"""What others call config keys and flags, for the suggestions of errors: names of the field and of its libraries."""

from collections.abc import Iterable

_CONFIG = {  # keys: other names of them
    "optim.lr": "lr learning_rate lrate max_lr base_lr peak_lr step_size",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio warmup_fraction warm_up "
                          "warmup_steps warmup_updates",
    "optim.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type lr_decay lr_decay_style",
    "optim.final_lr_fraction": "min_lr lr_min end_lr final_lr min_lr_ratio",
    "optim.decay_fraction": "decay_steps lr_decay_iters cooldown cooldown_steps cooldown_fraction",
    "optim.weight_decay": "wd weight_decay adam_w decay",
    "optim.clip_norm": "grad_clip gradient_clip gradient_clip_val gradient_clipping max_grad_norm clip clip_grad "
                       "clip_grad_norm clip_gradients grad_norm",
    "optim.beta1": "b1 adam_beta1 adam_b1 betas momentum",
    "optim.beta2": "b2 adam_beta2 adam_b2",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.ema_decay": "ema ema_decay ema_rate ema_momentum polyak",
    "train.steps": "steps max_steps num_steps n_steps total_steps num_train_steps train_steps training_steps updates "
                   "iterations num_iterations max_iters train_iters max_updates epochs num_epochs max_epochs "
                   "num_train_epochs",
    "train.batch_size": "batch batch_size bs global_batch_size train_batch_size per_device_train_batch_size "
                   "per_device_batch_size",
    "train.noise_samples": "views noise_samples num_views num_noise_samples",
    "train.init_from": "init_from init_checkpoint pretrained from_pretrained pretrained_model load_from init_weights "
                       "finetune_from model_name_or_path",
    "train.lora_rank": "lora_rank lora_r lora_dim r rank",
    "train.lora_alpha": "lora_alpha lora_scale",
    "train.anneal_steps": "annealing annealing_steps attention_annealing",
    "compute.microbatch": "microbatch micro_batch micro_batch_size microbatch_size gradient_accumulation "
                          "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches accum_steps",
    "compute.dtype": "precision mixed_precision bf16 fp16 amp compute_dtype torch_dtype",
    "compute.attention": "attn attn_implementation attn_impl attention_backend attention_impl flash_attention",
    "compute.remat": "remat gradient_checkpointing activation_checkpointing remat_policy grad_checkpoint checkpointing",
    "compute.layers": "scan_layers",
    "data.seq_len": "length seq_len seq_length sequence_length max_length max_len max_seq_len max_seq_length context "
                   "context_length context_size context_window ctx_len n_ctx max_position_embeddings row_length",
    "data.source": "dataset dataset_name corpus data_source data_set",
    "data.path": "data_path data_dir data_file train_file train_path dataset_path files file",
    "data.tokenizer": "tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path",
    "data.packing": "layout packing pack wrap padding",
    "data.field": "text_field text_column column text_key",
    "data.valid_fraction": "val_fraction valid_split validation_split val_split validation_fraction eval_fraction "
                           "test_size",
    "data.workers": "num_workers dataloader_num_workers loader_workers",
    "data.cache_dir": "cache cache_path",
    "model.num_layers": "layers num_layers n_layers n_layer num_hidden_layers depth num_blocks n_blocks",
    "model.hidden_size": "width hidden_size hidden_dim d_model n_embd embed_dim embedding_dim emb_dim dim model_dim "
                   "embed_size",
    "model.num_heads": "heads num_heads n_heads n_head num_attention_heads attention_heads",
    "model.num_kv_heads": "num_kv_heads num_key_value_heads n_kv_heads",
    "model.intermediate_size": "intermediate_size ffn_dim d_ff mlp_dim ffn_hidden_size ff_dim n_inner",
    "model.mlp_ratio": "intermediate_size ffn_dim d_ff mlp_dim ffn_hidden_size ff_dim n_inner expansion mlp_expansion",
    "model.dropout": "dropout dropout_rate dropout_prob p_drop resid_pdrop attention_dropout hidden_dropout_prob",
    "model.vocab_size": "vocab vocabulary_size vocabulary n_vocab num_embeddings",
    "model.tie_embeddings": "tie_embeddings tie_word_embeddings tied_embeddings weight_tying",
    "model.rope_theta": "rope_theta rotary_base rope_freq_base",
    "model.norm_eps": "layer_norm_eps rms_norm_eps layer_norm_epsilon layernorm_epsilon",
    "model.num_experts": "num_experts n_experts n_routed_experts num_local_experts",
    "model.top_k": "num_experts_per_tok experts_per_token",
    "model.load_balancing": "router_aux_loss_coef load_balancing aux_loss",
    "model.window": "local_attention sliding_window",
    "model.kind": "architecture arch backbone model_type model_name model_kind",
    "model.time_conditioning": "time_conditioned sigma_conditioning timestep_embedding",
    "diffusion.kind": "algo algorithm objective loss parameterization method diffusion_type",
    "diffusion.block_size": "block_size block_length blocksize block_len",
    "diffusion.schedule": "noise_schedule noise_type beta_schedule",
    "diffusion.eps": "sampling_eps sampling_eps_min antithetic_eps",
    "diffusion.clip_low": "sampling_eps_low clip_min mask_low beta_low",
    "diffusion.clip_high": "sampling_eps_max clip_max mask_high beta_high",
    "log.every": "log_every logging_steps log_interval log_freq log_every_n_steps print_every",
    "checkpoint.every": "save_steps save_every save_interval ckpt_every checkpoint_every checkpoint_interval "
                        "save_freq checkpoint_steps",
    "checkpoint.keep": "save_total_limit keep_last max_to_keep keep_checkpoints",
    "checkpoint.keep_best": "save_best load_best_model_at_end",
    "eval.every": "eval_steps eval_every eval_interval eval_freq valid_every val_every val_check_interval "
                  "validation_steps",
    "eval.batch_size": "eval_batch eval_batch_size per_device_eval_batch_size valid_batch_size",
    "eval.mc_samples": "draws mc_samples num_mc_samples mc_num monte_carlo_samples eval_iters",
    "eval.num_samples": "num_samples num_sample_batches n_samples",
    "mesh.data": "dp data_parallel dp_size",
    "mesh.fsdp": "fsdp zero fsdp_size shard sharded",
    "mesh.tensor": "tp tensor_parallel tensor_parallel_size tp_size model_parallel",
    "mesh.expert": "ep expert_parallel ep_size",
    "seed": "seed random_seed rng_seed random_state manual_seed global_seed",
}
_FLAGS = {  # flags of commands, and options of `LM.generate`
    "workdir": "model model_path model_dir model_name model_name_or_path checkpoint ckpt checkpoint_path run run_dir "
               "output_dir logdir log_dir dir path pretrained",
    "length": "max_new_tokens max_tokens max_length max_len seq_len seq_length gen_length gen_len num_tokens "
              "sample_length n_predict max_gen_toks",
    "num_samples": "n n_samples num_return_sequences samples count",
    "temperature": "temp",
    "top_k": "topk k",
    "top_p": "topp p nucleus nucleus_p p_nucleus",
    "min_p": "minp",
    "repetition_penalty": "rep_penalty repeat_penalty rep_pen",
    "steps": "num_steps n_steps diffusion_steps denoising_steps sampling_steps num_inference_steps iterations",
    "block_size": "block_length block_len blocksize gen_blocksize",
    "guidance_scale": "cfg cfg_scale classifier_free_guidance",
    "sampler": "remasking strategy alg algorithm decoding method predictor",
    "stop": "stop_sequences stop_strings until stop_words",
    "seed": "random_seed rng_seed random_state manual_seed",
    "constraint": "regex grammar pattern",
    "json_schema": "schema json",
    "out": "output output_file output_path o save_to",
    "prompt": "prompts text input",
    "text": "input prompt",
    "data": "dataset corpus data_path file",
    "mc_samples": "num_mc_samples mc_num num_draws monte_carlo_samples",
    "batch_size": "bs eval_batch_size",
    "step": "checkpoint_step ckpt_step global_step",
    "baseline": "compare compare_to",
    "weights": "ema use_ema",
    "num_fewshot": "n_shot fewshot num_shots",
    "num_problems": "limit max_problems",
    "from": "source input src model",
    "to": "target output dst dest destination output_dir",
    "dtype": "torch_dtype precision outtype",
    "parallel": "jobs n_jobs workers num_workers",
    "num_workers": "jobs n_jobs processes",
    "cache_dtype": "kv_cache_dtype cache_type",
    "approximate_cache": "dual_cache use_cache prefix_cache kv_cache",
    "num_processes": "world_size nproc",
    "process_id": "rank node_rank process_index",
    "coordinator": "coordinator_address master_addr",
}


def _invert(table: dict[str, str]) -> dict[str, list[str]]:
    matches: dict[str, list[str]] = {}
    for canonical, names in table.items():
        for name in names.split():
            matches.setdefault(name, []).append(canonical)
    return matches


CONFIG, FLAGS = _invert(_CONFIG), _invert(_FLAGS)


def config_key(name: str, valid_names: Iterable[str] | None = None) -> str | None:
    """The config key (of those `valid_names`) that others call so; `name` may have a section. None if there is none."""
    matches = CONFIG.get(_plain(name.rpartition(".")[2]), ())
    valid_names = matches if valid_names is None else list(valid_names)
    return next((key for key in matches if key in valid_names), None)


def flag(name: str, valid_names: Iterable[str]) -> str | None:
    """The flag or option among those `valid_names` that others call so; None if there is none."""
    valid_names = list(valid_names)
    return next((canonical for canonical in FLAGS.get(_plain(name), ()) if canonical in valid_names), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
