"""Which flags of Megatron work with MeCo.

Every flag of Megatron-Core 0.18, 0.19 and of its main branch (d98e8a64) is in exactly one of
`HONOURED`, `REFUSED`, `UNTESTED`, `OTHER_PROGRAMS` and `COMPANIONS`. Any other flag belongs to a
newer Megatron and is refused until it is added here (`megatron_meco.refusals`,
`tests/training/test_megatron_flags.py`). Names are argparse's `dest`.
"""

from __future__ import annotations


def names_in(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


HONOURED = names_in(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    accumulate_allreduce_grads_in_fp32 activation_func_clamp_value adam_beta1 adam_beta2 adam_eps
    add_bias_linear add_position_embedding add_qkv_bias adlr_autoresume adlr_autoresume_interval
    align_grad_reduce align_param_gather allow_ambiguous_pad_tokens app_tag_run_name
    app_tag_run_version apply_query_key_layer_scaling apply_residual_connection_post_layernorm
    apply_rope_fusion apply_wd_to_qk_layernorm async_ckpt_cpu_priority async_ckpt_io_priority
    async_ckpt_use_cpu_shm async_save async_strategy attention_backend attention_dropout
    attention_softmax_in_fp32 auto_detect_ckpt_format barrier_with_L1_time batch_size bf16
    bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion calc_ft_timeouts
    calculate_per_token_loss check_for_large_grads check_for_nan_in_loss_and_grad
    check_for_spiky_loss check_weight_hash_across_dp_replicas_interval checkpoint_activations
    ckpt_assume_constant_structure ckpt_drop_redundant_extra_state ckpt_format
    ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo
    ckpt_fully_parallel_load_per_rank_objects ckpt_fully_parallel_load_process_group
    ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated
    ckpt_fully_parallel_save_process_group ckpt_load_validate_sharding_integrity
    ckpt_pg_tensors_cache_create ckpt_pg_tensors_cache_path ckpt_step clip_grad
    clone_scatter_output_in_embedding config_logger_dir context_parallel_size
    create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion
    data_args_path data_cache_path data_parallel_random_init data_path
    dataloader_inter_document_masking dataloader_type
    ddp_average_in_collective ddp_bucket_size ddp_num_buckets
    ddp_pad_buckets_for_high_nccl_busbw ddp_param_name_patterns_for_fp32_local_accumulation
    ddp_reduce_scatter_with_fp32_accumulation decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers decoupled_lr decoupled_min_lr defer_embedding_wgrad_compute
    deprecated_use_mcore_models deterministic_mode disable_bf16_reduced_precision_matmul
    disable_jit_fuser disable_msc_deprecated disable_straggler_on_startup
    disable_symmetric_registration dist_ckpt_format_deprecated dist_ckpt_optim_fully_reshardable
    dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness dist_ckpt_workers
    distrib_optim_fully_reshardable_mem_efficient distribute_saved_activations distributed_backend
    distributed_timeout_minutes distributed_timeout_seconds_after_init dump_param_to_param_group_map
    embedding_init_method_std empty_unused_memory_level enable_experimental enable_ft_package
    enable_msc enable_one_logger encoder_num_layers end_weight_decay error_injection_rate
    error_injection_type eval_global_batch_size eval_interval eval_iters eval_micro_batch_size
    exit_duration_in_mins exit_interval exit_on_missing_checkpoint exit_signal exit_signal_handler
    exit_signal_handler_for_dataloader exit_signal_handler_for_training exp_avg_dtype
    exp_avg_sq_dtype fault_injector_delay_start_iteration fault_injector_fault_delay
    fault_injector_fault_probabilities fault_injector_fault_types fault_injector_mtti_seconds
    fault_injector_num_ranks fault_injector_offset_seconds fault_injector_ranks fault_injector_seed
    ffn_hidden_size finetune first_last_layers_bf16 flash_attention_version
    flight_recorder_dump_on_timeout flight_recorder_dump_path flight_recorder_extra_dump_on_exec
    flight_recorder_include_only_active flight_recorder_include_stack_trace
    flight_recorder_trace_buffer_size fp16 fp16_lm_cross_entropy fp32_residual_connection fp8
    fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj
    fp8_param_gather fp8_quantizer_factory fp8_recipe fp8_wgrad ft_num_warmup_iters
    full_validation
    global_batch_size glu_linear_offset gpu_sniff_test_interval grad_reduce_in_bf16
    gradient_accumulation_fusion gradient_reduce_div_fusion group_query_attention hidden_dropout
    hidden_size high_priority_stream_groups hybrid_layer_pattern hybrid_override_pattern hysteresis
    init_method_std init_method_xavier_uniform initial_loss_scale iterations_to_skip kv_channels
    layernorm_epsilon layernorm_zero_centered_gamma lion_beta1 lion_beta2 load
    load_main_params_from_ckpt local_rank log_device_memory_used log_energy log_interval
    log_loss_scale_to_tensorboard log_max_attention_logit log_memory_interval
    log_memory_to_tensorboard log_num_zeros_in_grad log_params_norm log_progress log_straggler
    log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard
    log_world_size_to_tensorboard logging_level loss_scale loss_scale_window lr lr_decay_iters
    lr_decay_samples lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters
    lr_warmup_samples lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style main_grads_dtype
    main_params_dtype make_vocab_size_divisible_by manual_gc manual_gc_eval manual_gc_interval
    masked_softmax_fusion max_position_embeddings memory_snapshot_path merge_file metadata_path
    micro_batch_size microbatch_group_size_per_vp_stage mid_level_dataset_surplus min_loss_scale
    min_lr mmap_bin_files model_parallel_size moe_router_load_balancing_type mscale mscale_all_dim
    mtp_num_layers multi_latent_attention muon_coefficient_type muon_extra_scale_factor
    muon_fp32_matmul_prec muon_momentum muon_nesterov muon_num_ns_steps muon_scalar_optimizer
    muon_scale_mode muon_split_qkv muon_tp_mode muon_use_syrk nccl_communicator_config_path nccl_ub
    no_load_optim no_load_rng no_persist_layer_norm no_rope_freq no_save_optim no_save_rng
    no_weight_decay_cond_type non_persistent_ckpt_type non_persistent_global_ckpt_dir
    non_persistent_local_ckpt_algo non_persistent_local_ckpt_dir non_persistent_save_interval
    normalization null_tokenizer_eod_id null_tokenizer_pad_id num_attention_heads
    num_dataset_builder_threads num_distributed_optimizer_instances num_experts num_layers
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_per_virtual_pipeline_stage
    num_query_groups num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges
    object_storage_cache_path one_logger_async one_logger_project one_logger_run_name openai_gelu
    optimizer optimizer_cpu_offload optimizer_offload_fraction otel_enabled otel_service_name
    otel_span_groups overlap_cpu_optimizer_d2h_h2d overlap_grad_reduce overlap_p2p_comm
    overlap_p2p_comm_warmup_flush overlap_param_gather overlap_param_gather_with_optimizer_step
    override_opt_param_scheduler pad_vocab_size padded_vocab_size per_split_data_args_path
    perform_initialization pin_cpu_grads pin_cpu_params pipeline_model_parallel_comm_backend
    pipeline_model_parallel_layout pipeline_model_parallel_size position_embedding_type
    pretrained_checkpoint profile profile_ranks profile_step_end profile_step_start
    pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra
    pytorch_profiler_collect_shapes qk_clip qk_clip_alpha qk_clip_threshold qk_l2_norm qk_layernorm
    quick_geglu recompute_activations recompute_granularity recompute_method recompute_modules
    recompute_num_layers record_memory_history record_shapes rerun_mode
    result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag rope_scaling_factor
    rotary_base rotary_interleaved rotary_percent rotary_scaling_factor
    rotary_seq_len_interpolation_factor run_workload_inspector_server save save_activations_interval
    save_dgrads_interval save_interval save_params_interval save_retain_interval
    save_tokenizer_assets save_wgrads_interval seed seq_length sequence_parallel sgd_momentum
    sharp_enabled_group skip_train softmax_type spec special_tokens split squared_relu
    start_eval_at_iter start_weight_decay step_batch_size_schedule straggler_ctrlr_port
    straggler_minmax_count stream_ckpt_dequant swiglu te_rng_tracker tensor_model_parallel_size
    tensorboard_dir tensorboard_log_interval tensorboard_queue_size test_data_path
    tiktoken_num_special_tokens tiktoken_pattern timing_log_level timing_log_option
    tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast tokenizer_model
    tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy tokenizer_type
    tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap
    tp_comm_overlap_ag tp_comm_overlap_cfg tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_split_ag tp_comm_split_rs train_data_path train_iters train_samples train_sync_interval
    transformer_impl trust_remote_code untie_embeddings_and_output_weights use_checkpoint_args
    use_checkpoint_opt_param_scheduler use_cpu_initialization use_dist_ckpt_deprecated
    use_distributed_optimizer use_flash_attn use_gigatoken use_gloo_process_groups
    use_layer_wise_param_layout use_mp_args_from_checkpoint_args use_persistent_ckpt_worker
    use_precision_aware_optimizer use_pytorch_profiler use_rope_scaling
    use_rotary_position_embeddings use_sharp use_tokenizer_model_from_checkpoint_args
    use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping valid_data_path
    multiple_validation_sets validation_set_names verify_integrity
    vocab_extra_ids vocab_file vocab_size wandb_entity wandb_exp_name wandb_project wandb_save_dir
    warmup weight_decay weight_decay_incr_style wgrad_deferral_limit window_attn_skip_freq
    window_size
    """
)
"""Flags that mean the same with `--meco` as without."""

_FULL_EXPERTS = (
    "an expert that is full drops tokens: those of one document would decide about those of others",
)
REFUSED: dict[str, tuple[str, ...]] = {
    "ckpt_format": ("Megatron writes this format for FSDP only", "Use torch_dist."),
    "create_attention_mask_in_dataloader": (
        "MeCo separates documents by cu_seqlens and makes no dense mask",
    ),
    "dataloader_defer_npy_index_mmap": ("MeCo has a plan in place of Megatron's .npy index",),
    "dataloader_fast_cache_load": ("MeCo has a plan in place of Megatron's .npy index",),
    "dataloader_type": (
        "the phase of a sample is decided by its place in the run, and this loader shuffles",
        "Use single or external. Packs are shuffled when they are planned.",
    ),
    "decrease_batch_size_if_needed": (
        "the phases are counted in samples of the given batch size",
        "Choose a --global-batch-size that the layout divides.",
    ),
    "encoder_seq_length": ("plans and layers have one length", "Use --seq-length."),
    "eod_mask_loss": ("it masks by token id; MeCo trains on EOD and masks borders by position",),
    "experimental_attention_variant": (
        "nobody has shown that this attention keeps packed documents apart",
    ),
    "fim_data": (
        "it rearranges the tokens that MeCo masks by position",
        "Drop --fim-data or --meco.",
    ),
    "heterogeneous_layers_config_encoded_json": (
        "nobody has shown that these layers keep packed documents apart",
    ),
    "heterogeneous_layers_config_path": (
        "nobody has shown that these layers keep packed documents apart",
    ),
    "hierarchical_context_parallel_sizes": (
        "Transformer Engine 2.18 has hierarchical context parallelism for unpacked batches alone",
        "Use --context-parallel-size with --cp-comm-type p2p.",
    ),
    "hybrid_context_parallel": (
        "its data loader deals parts of a sample to several ranks, and a pack is one piece",
        "Use --context-parallel-size.",
    ),
    "max_seqlen_per_dp_cp_rank": ("it belongs to --hybrid-context-parallel",),
    "mock_data": ("mock documents have no metadata", "Give --data-path, or drop --meco."),
    "modelopt_enabled": (
        "ModelOpt's loss replaces the masked one",
        "Drop one of the two.",
    ),
    "moe_expert_capacity_factor": _FULL_EXPERTS,
    "moe_expert_rank_capacity_factor": _FULL_EXPERTS,
    "moe_pad_expert_input_to_capacity": _FULL_EXPERTS,
    "moe_router_fusion": (
        "Transformer Engine's fused loss takes a whole number of tokens; with a padding mask, "
        "without which padding counts, Megatron gives it a fraction",
    ),
    "moe_router_load_balancing_type": (
        "sinkhorn chooses experts by all tokens of a micro-batch, so that documents depend on each "
        "other, and Megatron's quantile balancing takes no padding mask",
        "Use aux_loss, seq_aux_loss, global_aux_loss or none.",
    ),
    "moe_token_drop_policy": _FULL_EXPERTS,
    "mrope_section": ("it sets rotary positions of images, and MeCo trains on text",),
    "non_persistent_ckpt_type": (
        "on a restart the samples cannot be compared with those of a local checkpoint",
        "Use --non-persistent-ckpt-type global.",
    ),
    "overlap_moe_expert_parallel_comm": (
        "it takes its steps from a schedule that MeCo's forward step does not make",
    ),
    "per_dataset_sequences_path": ("MeCo reads the lengths of documents from the .idx files",),
    "phase_transition_iterations": (
        "it saves and ends the run; MeCo switches inside the run",
        "Use --meco-cooldown-start-iteration.",
    ),
    "position_embedding_type": (
        "these positions are not tested with packed documents",
        "Use rope, yarn, learned_absolute or none.",
    ),
    "rampup_batch_size": (
        "Megatron parses the flag and ignores it",
        "Use --step-batch-size-schedule.",
    ),
    "reset_attention_mask": (
        "Transformer Engine ignores it silently; MeCo separates documents by cu_seqlens",
    ),
    "reset_position_ids": (
        "it finds documents by the EOD token; MeCo restarts positions at each document",
    ),
    "sft": ("it packs samples in its own way", "Drop --sft or --meco."),
    "sft_tokenizer_prompt_format": ("it belongs to --sft",),
    "transformer_impl": (
        "these layers are for inference",
        "Use --transformer-impl transformer_engine or local.",
    ),
    "use_megatron_fsdp": (
        "it has one checkpoint format, fsdp_dtensor, which `meco export` and `generate` do not "
        "read and from which resuming is not tested",
        "Use --use-distributed-optimizer.",
    ),
    "use_torch_fsdp2": (
        "Megatron saves and resumes it in no format: in torch_dist "
        "`optim_state_to_sharding_state` finds no sharded parameters, and for torch_dcp "
        "`load_checkpoint` passes is_loading, which `ChainedOptimizer.state_dict` does not take",
        "Use --use-distributed-optimizer.",
    ),
    "yaml_cfg": ("MeCo checks command-line flags", "Give the flags on the command line."),
}
"""Flags that contradict MeCo: the reason, and the remedy where it is not to drop the flag.

`megatron_meco.refusals` names those of which some values are honoured."""

UNTESTED = names_in(
    """
    activation_offload_fraction attention_output_gate batch_invariant_backend batch_invariant_mode
    ckpt_convert_format ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers cuda_graph_impl
    cuda_graph_modules cuda_graph_scope_deprecated cuda_graph_warmup_steps
    delay_offload_until_cuda_graph delay_wgrad_compute delta_offload_bytes_across_pp_ranks
    enable_cuda_graph enable_mhc_connections expert_tensor_parallel_num_weight_shards
    external_cuda_graph fake_process_group fine_grained_activation_offloading
    fine_grained_offloading_max_inflight_offloads fp4 fp4_param_gather fp4_quantizer_factory
    fp4_recipe freeze_all_layers fused_residual_rmsnorm gtp_expert_remat_nccl_ub gtp_remat_nccl_ub
    gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation
    init_model_with_meta_device inprocess_restart kitchen_attention_backend lazy_mpu_init
    logit_dtype logits_load_decode_threads logits_load_dir logits_load_ignore_errors
    logits_load_kd_loss_alpha logits_load_msc_prefetch_depth logits_load_prefetch_factor
    logits_save_dir logits_save_dtype logits_save_top_k logits_save_top_p logits_save_top_p_min_k
    mhc_init_gating_factor mhc_num_residual_streams mhc_recompute_layer_num mhc_sinkhorn_iterations
    min_offloaded_tensor_size mlp_chunks_for_training moe_combine_bwd_dtype moe_dispatch_fwd_dtype
    moe_enable_routing_replay moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
    moe_input_jitter_eps moe_latent_size moe_mlp_glu_interleave_size moe_ncclep_static_shape
    moe_ncclep_zero_copy moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
    moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size
    moe_permute_fusion_into_hybridep moe_router_force_biased moe_router_force_load_balancing
    moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_router_quantile_balancing_ema
    moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits
    moe_routing_trace_dump_weights moe_routing_trace_max_training_iters moe_routing_trace_path
    moe_shared_expert_glu_interleave_size moe_single_grouped_bias moe_single_grouped_weight
    moe_upcycling_granularity moe_use_grouped_tensor moe_use_upcycling mup_attn_scale_power
    mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
    offload_modules optimizer_cuda_graph overlap_dispatch_backward_with_experts_wgrad
    override_ckpt_iteration replication replication_factor replication_jump
    save_tokens_per_expert_interval te_precision_config_file tensor_parallel_num_weight_shards
    test_mode use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp use_kitchen_attention
    use_mup use_ring_exchange_p2p use_te_activation_func use_transformer_engine_op_fuser
    """
)
"""Flags that change layers, losses or checkpoints in ways nobody has tried with `--meco`.

`--meco-allow-flags NAME` lets one through."""

OTHER_PROGRAMS = {
    "reinforcement learning": names_in(
        """
        grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward grpo_group_size grpo_iterations grpo_kl_beta
        grpo_prompts_per_step langrl_env_config perform_rl_step refit_method
        rl_consumption_granularity rl_default_temperature rl_default_top_k rl_default_top_p
        rl_durable_rollout_bank rl_generation_batch_size rl_generation_lag
        rl_num_parallel_generation_batches rl_num_parallel_generations rl_parallel_generation_tasks
        rl_importance_sampling_truncation_coef
        rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size
        rl_inference_logprobs_is_correction rl_inference_model_unified_memory_level
        rl_inference_parsers rl_inference_pipeline_model_parallel_size
        rl_inference_tensor_model_parallel_size rl_kv_cache_management_mode rl_max_inflight_requests
        rl_offload_inference_model_weights_when_idle rl_offload_optimizer_during_inference
        rl_partial_rollouts rl_persist_cuda_graphs rl_profile rl_profile_dir rl_prompts_per_eval
        rl_rollout_bank_dir rl_rollout_bank_max_bytes rl_sequence_packing_algo
        rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token rl_submission_granularity
        rl_training_cuda_graphs rl_use_sequence_packing rl_verify_model_weights_swap
        """
    ),
    "vision models": names_in(
        """
        classes_fraction data_per_class_fraction data_sharding dino_bottleneck_size
        dino_freeze_last_layer dino_head_hidden_size dino_local_crops_number dino_local_img_size
        dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp
        dino_warmup_teacher_temp_epochs head_lr_mult img_h img_w iter_per_epoch mask_factor
        mask_type num_channels num_classes patch_dim swin_backbone_type vision_backbone_type
        vision_pretraining vision_pretraining_type
        """
    ),
    "BERT, T5 and retrieval models": names_in(
        """
        bert_binary_head bert_embedder_type bert_load biencoder_projection_dim
        biencoder_shared_query_context_model block_data_path decoder_num_layers decoder_seq_length
        embedding_path evidence_data_path ict_head_size ict_load indexer_batch_size
        indexer_log_interval mask_prob onnx_safe output_bert_embeddings query_in_block_prob
        relative_attention_max_distance relative_attention_num_buckets
        retriever_report_topk_accuracies retriever_score_scaling sample_rate short_seq_prob
        titles_data_path use_one_sent_docs
        """
    ),
    "inference": names_in(
        """
        cache_mla_latents chat_template decode_only_cuda_graphs enable_chunked_prefill flash_decode
        inference_batch_times_seqlen_threshold inference_coordinator_port
        inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens inference_cuda_graph_scope
        inference_disable_ep_consensus inference_disable_triton_nvls_kernels
        inference_dynamic_batching inference_dynamic_batching_async_sched_mode
        inference_dynamic_batching_block_size inference_dynamic_batching_buffer_size_gb
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution
        inference_dynamic_batching_enable_prefix_caching inference_dynamic_batching_logprobs_mode
        inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_max_requests
        inference_dynamic_batching_max_tokens inference_dynamic_batching_num_cuda_graphs
        inference_dynamic_batching_paused_buffer_size_gb
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_prefix_caching_routing_alpha
        inference_dynamic_batching_sampling_backend
        inference_dynamic_batching_track_generated_token_events
        inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_unified_memory_level inference_fuse_tp_communication
        inference_grouped_gemm_backend inference_logging_step_interval inference_max_requests
        inference_max_seq_length inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type inference_rng_tracker inference_shards
        inference_text_gen_server_logging inference_use_synchronous_zmq_collectives
        inference_wandb_logging mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
        max_tokens_to_oom mlp_chunks_for_prefill moe_pad_experts_for_cuda_graph_inference
        nccl_all_reduce_for_prefill num_speculative_tokens offset_sampling_seed_by_dp_rank
        symmetric_ar_type use_legacy_static_engine
        """
    ),
}
"""Flags of Megatron's other programs, which GPT and hybrid pre-training accept and ignore."""

COMPANIONS = {
    "num_experts": names_in(
        """
        expert_model_parallel_size expert_tensor_parallel_size high_priority_a2a_comm_stream
        moe_apply_probs_on_input moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep
        moe_ffn_hidden_size moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grouped_gemm
        moe_layer_freq moe_layer_recompute moe_per_layer_logging moe_permute_fusion
        moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias
        moe_router_group_topk moe_router_num_groups moe_router_pre_softmax moe_router_score_function
        moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate
        moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_token_dispatcher_type
        moe_z_loss_coeff use_grouped_gemm_for_shared_expert
        """
    ),
    "overlap_moe_expert_parallel_comm": names_in("ep_overlap_early_attn_memory_release"),
    "mtp_num_layers": names_in(
        """
        mtp_detach_heads mtp_hsm mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_standalone
        mtp_use_repeated_layer
        """
    ),
    "experimental_attention_variant": names_in(
        """
        dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
        dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset
        dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend
        linear_attention_freq
        """
    ),
    "hybrid_layer_pattern": names_in(
        """
        gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute gdp_num_householder is_hybrid_model
        linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
        linear_value_head_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim
        mamba_training_ssm_states_dtype use_mamba_mem_eff_path
        """
    ),
    "fim_data": names_in(
        """
        fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token
        fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token
        """
    ),
    "multi_latent_attention": names_in(
        """
        kv_lora_rank mla_down_proj_fusion q_lora_rank qk_head_dim qk_pos_emb_head_dim rope_type
        v_head_dim
        """
    ),
    "use_megatron_fsdp": names_in(
        """
        create_all_gather_group data_parallel_sharding_strategy enable_full_sharding_in_hsdp
        fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration
        keep_fp8_transpose_cache megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_grad_comm_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype
        megatron_fsdp_max_pool_double_buffer megatron_fsdp_version outer_dp_sharding_strategy
        strict_fsdp_dtensor_load suggested_communication_unit_size torch_fsdp2_reshard_after_forward
        """
    ),
    "context_parallel_size": names_in("cp_comm_type"),
    "inprocess_restart": names_in(
        """
        inprocess_active_world_size inprocess_barrier_timeout inprocess_completion_timeout
        inprocess_empty_cuda_cache inprocess_granularity inprocess_hard_timeout
        inprocess_heartbeat_interval inprocess_heartbeat_timeout inprocess_last_call_wait
        inprocess_max_iterations inprocess_monitor_process_interval
        inprocess_monitor_thread_interval inprocess_progress_watchdog_interval
        inprocess_soft_timeout inprocess_termination_grace_time
        """
    ),
    "position_embedding_type": names_in(
        """
        yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
        yarn_original_max_position_embeddings
        """
    ),
}
"""Flags that have an effect only together with the flag under which they are listed."""
