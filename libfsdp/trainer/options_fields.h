// The field lists of options.h, one line an option.
#pragma once

#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

template <class V>
void RankOptions::fields(V& v) {
  v.group("Ranks and precision");
  v("nproc_per_node", nproc_per_node, "Ranks that finetune starts on this machine.",
    {.aliases = {"num_processes"}, .min = 1, .max = 1024});
  v("sharding_strategy", sharding_strategy,
    "What is sharded over the ranks: everything, all but the gathered weights, either of them in "
    "groups of ranks that are copies of each other, or nothing.",
    {.aliases = {"fsdp_sharding_strategy"},
     .choices = {"FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "NO_SHARD"}});
  v("sharding_group_size", sharding_group_size,
    "HYBRID_SHARD: ranks that divide the weights among them; 0 = the ranks of a host.",
    {.min = 0, .max = 1 << 16});
  v("gather_slots", gather_slots,
    "Layers whose weights are gathered at a time, besides those kept; none = as the strategy says. "
    "Ranks of one host that keep the weights once gather nothing.",
    {.min = 1, .max = 1 << 16});
  v("kept_units", kept_units,
    "Last layers that stay gathered for the whole step; none = as the strategy says.",
    {.min = 0, .max = 1 << 16});
  v("memory_budget_gib", memory_budget_gib,
    "Keep as many layers gathered as fit into so many GiB a rank (weights, gradients, optimizer; "
    "not activations); too little is an error before anything is loaded.",
    {.min = 0, .max = 1e6, .above_min = true});
  v("offload", offload,
    "Keep the optimizer's state, or the weights too, in the host's memory. Ranks that compute on "
    "the "
    "CPU have them there.",
    {.choices = {"none", "optimizer", "parameters"}});
  v("bf16", bf16, "bfloat16 weights and activations over an exact fp32 master; fp32 otherwise.");
  v("pure_bf16", pure_bf16,
    "bfloat16 weights without a master, AnyPrecision AdamW with Kahan summation: least memory.");
  v("fp16", fp16, "float16 weights and activations over an fp32 master, with a loss scaler.");
  v("deterministic", deterministic, "Results are bitwise equal at any number of ranks.");
  v("peer_timeout", peer_timeout,
    "Seconds after which a rank that is stopped or shows no sign of life is lost; none = "
    "FSDP_PEER_TIMEOUT, or 8.",
    {.min = 0, .max = 1e6, .above_min = true});
  v("ddp_timeout", ddp_timeout,
    "Longest wait of a collective in seconds, whatever the others do; none = FSDP_COMM_TIMEOUT, or "
    "1800.",
    {.min = 0, .max = 1e6, .above_min = true});
  v("config", config, "A yaml file with any of these options; the command line wins over it.");
}

template <class V>
void SequenceOptions::fields(V& v) {
  v("max_seq_length", max_seq_length, "Tokens of a sequence; longer answers are cut on the right.",
    {.aliases = {"max_length", "max_seq_len", "context_length"}, .min = 2, .max = 1 << 20});
  v("packing", packing,
    "Fill each sequence with several records; attention stays within a record.");
  v("train_on_inputs", train_on_inputs, "Loss on the prompts too, not on the answers only.");
}

template <class V>
void CheckpointOptions::fields(V& v) {
  v.group("Checkpoints");
  v("save_strategy", save_strategy,
    "When to save checkpoint-N into output_dir: every save_steps and at the end, at the end "
    "of each epoch, when an evaluation is the best so far, or never.");
  v("save_steps", save_steps,
    "With save_strategy=steps: every so many steps; below 1, a share of all steps.",
    {.min = 0, .max = 1e15, .above_min = true});
  v("save_total_limit", save_total_limit,
    "Keep so many checkpoints, the newest; the best one stays too. none = all.",
    {.min = 1, .max = 1 << 30});
  v("fsdp_state_dict_type", fsdp_state_dict_type,
    "Files of a checkpoint: whole tensors as Hugging Face's tools read them, or a file for each "
    "rank as torch.distributed.checkpoint reads them. Either resumes at any number of ranks.",
    {.aliases = {"checkpoint_type"}, .choices = {"SHARDED_STATE_DICT", "FULL_STATE_DICT"}});
  v("async_save", async_save,
    "Write checkpoints while training goes on, from a copy in host memory (12 bytes a parameter "
    "with AdamW, divided by the ranks).");
  v("load_best_model_at_end", load_best_model_at_end,
    "The final model is the best checkpoint's, not the last step's.");
  v("metric_for_best_model", metric_for_best_model,
    "What is best: loss or perplexity of the evaluation; none = loss where it matters.",
    {.choices = {"loss", "eval_loss", "perplexity", "eval_perplexity"}});
  v("greater_is_better", greater_is_better,
    "Whether a greater metric is better; none = false, as for loss and perplexity.",
    {.choices = {"true", "false"}});
  v("early_stopping_patience", early_stopping_patience,
    "End the run after so many evaluations in a row without a better metric; none = never.",
    {.min = 1, .max = 1 << 30});
  v("early_stopping_threshold", early_stopping_threshold,
    "What a metric must be better by to count as better for early_stopping_patience.", {.min = 0});
  v("resume_from_checkpoint", resume_from_checkpoint,
    "Go on where a checkpoint was made: its folder; `auto` = the newest whole one in output_dir, "
    "or from the start when there is none; `true` = likewise, but there must be one.");
  v("allow_changed_options", allow_changed_options,
    "Names of options that may differ from those of the run that is resumed, separated by commas.");
}

template <class V>
void QuantizationOptions::fields(V& v) {
  v("load_in_4bit", load_in_4bit,
    "Keep the frozen weights of linear layers in 4 bits (QLoRA). A folder whose weights are in 4 "
    "or 8 bits is read as it is, without these options.");
  v("load_in_8bit", load_in_8bit, "Keep them in 8 bits.");
  v("bnb_4bit_quant_type", bnb_4bit_quant_type, "Kind of 4 bits; none = nf4.",
    {.choices = {"nf4", "fp4"}});
  v("use_bnb_nested_quant", use_bnb_nested_quant, "4 bits: keep their scales in 8 bits.",
    {.aliases = {"bnb_4bit_use_double_quant"}});
}

template <class V>
void PeftOptions::fields(V& v) {
  v.group("Adapters");
  v("use_peft", use_peft, "Train an adapter, see peft_method; the model is frozen.");
  v("peft_method", peft_method,
    "Kind of adapter: low-rank adapters of linear layers (LoRA), tokens in the last layers that "
    "attention sees on the side, or keys and values in front of every layer's sequence.",
    {.choices = {"lora", "llama_adapter", "prefix"}});
  v("adapter_name_or_path", adapter_name_or_path,
    "Go on with the adapter of this PEFT folder; its kind and sizes are its own.");
  v("lora_r", lora_r, "Rank of the adapters.", {.aliases = {"r"}, .min = 1, .max = 1 << 16});
  v("lora_alpha", lora_alpha, "The adapters' result is multiplied by alpha / rank.");
  v("lora_dropout", lora_dropout, "Dropout before the adapters. With 0 a step keeps less memory.",
    {.min = 0, .max = 0.9999999});
  v("lora_target_modules", lora_target_modules,
    "Layers with an adapter: names, a regular expression for whole names, or all-linear; none = "
    "q_proj and v_proj.",
    {.aliases = {"target_modules"}});
  v("lora_modules_to_save", lora_modules_to_save, "Modules that are trained and saved whole.");
  v("use_rslora", use_rslora, "Multiply by alpha / sqrt(rank) instead.");
  v("use_dora", use_dora, "Weight-decomposed adapters (DoRA).");
  v("lora_bias", lora_bias, "Biases that are trained.", {.choices = {"none", "all", "lora_only"}});
  v("init_lora_weights", init_lora_weights, "First values of the adapters.",
    {.choices = {"default", "gaussian", "pissa", "olora", "orthogonal"}});
  v("loraplus_lr_ratio", loraplus_lr_ratio, "LoRA+: rate of B by that of A.",
    {.min = 0, .max = 1e6, .above_min = true});
  v("num_virtual_tokens", num_virtual_tokens, "prefix: tokens in front of the sequence.",
    {.min = 1, .max = 1 << 16});
  v("prefix_projection", prefix_projection,
    "prefix: train embeddings of its tokens and two layers that make the prefix of them.");
  v("adapter_len", adapter_len, "llama_adapter: tokens of a layer.", {.min = 1, .max = 1 << 16});
  v("adapter_layers", adapter_layers, "llama_adapter: the last so many layers have them.",
    {.min = 1, .max = 1 << 16});
  quantization.fields(v);
}

template <class V>
void FreezeOptions::fields(V& v) {
  v.group("Parts that are not trained");
  v("freeze_layers", freeze_layers, "Do not train the first num_freeze_layers decoder layers.");
  v("num_freeze_layers", num_freeze_layers, "How many layers freeze_layers means.",
    {.min = 1, .max = 1 << 16});
  v("freeze_modules", freeze_modules,
    "Modules and parameters that are not trained, separated by commas: names, their ends "
    "(layers.0, mlp.up_proj), or regular expressions for whole names.");
  v("unfreeze_modules", unfreeze_modules,
    "Those that are trained all the same; without freeze_layers and freeze_modules, these alone.");
}

template <class V>
void TrainOptions::fields(V& v) {
  v.group("Model and data");
  v("model_name_or_path", model_name_or_path,
    "Folder of the model in Hugging Face format. Required.", {.aliases = {"model_name"}});
  v("train_file", train_file, "Records to train on, one JSON object a line. Required.");
  v("validation_file", validation_file, "Records to evaluate on.", {.aliases = {"eval_file"}});
  v("output_dir", output_dir, "Folder for the trained model and its metrics. Required.");
  v("overwrite_output_dir", overwrite_output_dir, "Allow an output_dir that is not empty.");
  v("save_dtype", save_dtype, "Type of the saved weights; none = that of the source model.",
    {.choices = {"float32", "bfloat16", "float16"}});
  sequence.fields(v);
  v("shuffle", shuffle, "A new order of the records every epoch, a function of seed and epoch.");

  v.group("Batches and length");
  v("per_device_train_batch_size", per_device_train_batch_size,
    "Sequences of a micro-batch of one rank.",
    {.aliases = {"batch_size_training"}, .min = 1, .max = 1 << 20});
  v("per_device_eval_batch_size", per_device_eval_batch_size, "The same in evaluation.",
    {.aliases = {"val_batch_size"}, .min = 1, .max = 1 << 20});
  v("gradient_accumulation_steps", gradient_accumulation_steps,
    "Micro-batches of a rank in one optimizer step; none = 1, or when resuming what keeps the "
    "global batch.",
    {.min = 1, .max = 1 << 20});
  v("num_train_epochs", num_train_epochs, "Passes over the data; may be a fraction.",
    {.aliases = {"num_epochs"}, .min = 0, .max = 1e9, .above_min = true});
  v("max_steps", max_steps, "Optimizer steps in all, instead of num_train_epochs; -1 = by epochs.",
    {.min = -1, .max = 1e15});

  v.group("Optimizer");
  v("optim", optim, "AdamW, SGD, AdamW with 8-bit state, or AdamW for pure_bf16.",
    {.aliases = {"optimizer"},
     .choices = {"adamw_torch", "adamw_torch_fused", "sgd", "adamw_bnb_8bit", "anyprecision"}});
  v("momentum", momentum, "SGD: momentum.", {.min = 0, .max = 0.9999999});
  v("learning_rate", learning_rate, "Highest learning rate.", {.aliases = {"lr"}, .min = 0});
  v("weight_decay", weight_decay,
    "Decay of weights (decoupled with AdamW); norms and biases have none.", {.min = 0});
  v("adam_beta1", adam_beta1, "AdamW: decay of the mean of gradients.",
    {.min = 0, .max = 0.9999999});
  v("adam_beta2", adam_beta2, "AdamW: decay of the mean of squares.", {.min = 0, .max = 0.9999999});
  v("adam_epsilon", adam_epsilon, "AdamW: added to the denominator.", {.min = 0});
  v("max_grad_norm", max_grad_norm, "Largest global norm of the gradient; 0 = no clipping.",
    {.min = 0});
  v("grad_norm_type", grad_norm_type, "Which norm max_grad_norm limits.",
    {.choices = {"2", "1", "inf"}});
  v("max_grad_value", max_grad_value,
    "Largest magnitude of an element of the gradient; 0 = no limit.", {.min = 0});
  v("reduce_dtype", reduce_dtype,
    "Type in which gradients are sent (their sums are fp32); none = that of the weights.",
    {.choices = {"float32", "bfloat16", "float16"}});
  v("unsharded_accumulation", unsharded_accumulation,
    "Send gradients once a step instead of once a micro-batch: a copy of them on every rank.");
  v("lr_scheduler_type", lr_scheduler_type,
    "How the rate changes after the warm-up; `step` = times gamma after each epoch.");
  v("warmup_steps", warmup_steps, "Steps of linear warm-up; below 1, a share of all steps.",
    {.min = 0});
  v("warmup_ratio", warmup_ratio, "Share of all steps that warm up.", {.min = 0, .max = 1});
  v("gamma", gamma, "With lr_scheduler_type=step: factor on the rate after each epoch.",
    {.min = 0, .max = 1, .above_min = true});
  v("seed", seed, "Orders the data.", {.min = 0});
  v("gradient_checkpointing", gradient_checkpointing,
    "Recompute activations in backward: less memory, slower.");

  v.group("Logging and evaluation");
  v("logging_steps", logging_steps, "A line every so many steps (metrics.jsonl has every step).",
    {.min = 1});
  v("eval_strategy", eval_strategy,
    "When to evaluate; with `no` and a validation_file, once at the end.",
    {.aliases = {"evaluation_strategy"}});
  v("eval_steps", eval_steps,
    "With eval_strategy=steps: every so many steps; none = logging_steps.", {.min = 1});
  v("max_eval_samples", max_eval_samples, "Evaluate on the first so many records only.",
    {.min = 1});

  peft.fields(v);
  freezing.fields(v);
  checkpoints.fields(v);
  ranks.fields(v);

  v.refused({"save_only_model"}, "a checkpoint holds all that a resumed run needs");
  v.refused({"save_on_each_node"},
            "the ranks of all hosts write one checkpoint, which must be on a disk that they share");
  v.refused({"enable_jit_checkpoint"}, "SIGTERM always saves a checkpoint");
  v.refused({"push_to_hub", "hub_model_id", "hub_token"},
            "nothing is uploaded; the model is in output_dir");
  v.refused({"report_to"}, "metrics go to metrics.jsonl in output_dir");
  v.refused({"fsdp", "fsdp_config"}, "every run is fully sharded; see sharding_strategy");
  v.refused({"quantization"}, "see load_in_4bit and load_in_8bit");
}

template <class V>
void EvalOptions::fields(V& v) {
  v.group("Model and data");
  v("model_name_or_path", model_name_or_path,
    "Folder of the model in Hugging Face format. Required.", {.aliases = {"model_name"}});
  v("adapter_name_or_path", adapter_name_or_path, "PEFT folder of an adapter of the model.");
  quantization.fields(v);
  v("validation_file", validation_file, "Records to evaluate on, one JSON object a line. Required.",
    {.aliases = {"eval_file"}});
  v("output_dir", output_dir, "Folder for eval_results.json; none = print only.");
  sequence.fields(v);
  v("per_device_eval_batch_size", per_device_eval_batch_size,
    "Sequences of a micro-batch of one rank.",
    {.aliases = {"val_batch_size"}, .min = 1, .max = 1 << 20});
  v("max_eval_samples", max_eval_samples, "Evaluate on the first so many records only.",
    {.min = 1});
  ranks.fields(v);
}

template <class V>
void GenerateOptions::fields(V& v) {
  v.group("Model and prompt");
  v("model_name_or_path", model_name_or_path,
    "Folder of the model in Hugging Face format. Required.", {.aliases = {"model_name"}});
  v("adapter_name_or_path", adapter_name_or_path, "PEFT folder of an adapter of the model.");
  quantization.fields(v);
  v("prompt", prompt, "What to answer or to continue.");
  v("prompt_file", prompt_file,
    "Many prompts: records as in a train_file, whose answers are left out.");
  v("system", system, "A system message in front of the prompt.");
  v("raw", raw, "Continue the prompt as it is; otherwise the model's chat template is applied.");
  v("json", json, "One JSON object a prompt instead of streamed text.");
  v.group("Choice of tokens");
  v("max_new_tokens", max_new_tokens, "Most tokens to write.", {.min = 1, .max = 1 << 20});
  v("temperature", temperature, "0 = always the likeliest token.", {.min = 0, .max = 100});
  v("top_p", top_p, "Choose among the likeliest tokens that have this much probability together.",
    {.min = 0, .max = 1, .above_min = true});
  v("top_k", top_k, "Choose among this many likeliest tokens; 0 = all.", {.min = 0});
  v("stop", stop, "Texts that end the answer, beside the model's own end tokens.");
  v("seed", seed, "Seed of the choice.", {.min = 0});
  ranks.fields(v);
}

template <class V>
void MergeOptions::fields(V& v) {
  v("model_name_or_path", model_name_or_path,
    "Folder of the base model in Hugging Face format. Required.", {.aliases = {"model_name"}});
  v("adapter_name_or_path", adapter_name_or_path, "PEFT folder of its adapter. Required.");
  v("output_dir", output_dir, "Folder for the merged model. Required.");
  v("dequantize", dequantize,
    "Of a base in 4 or 8 bits: write all weights as this type; none = they stay as they are, and "
    "those with an adapter are quantised again.",
    {.choices = {"float32", "bfloat16", "float16"}});
  v("max_shard_size", max_shard_size, "Largest file of weights: a number and B, KB, MB, GB or TB.");
}

template <class V>
void ConvertOptions::fields(V& v) {
  v.group("Conversion");
  v("from", from,
    "A GGUF file of a Llama-family model; a file of torch.save; a folder with a model in Hugging "
    "Face format, full or sharded, with a checkpoint of torch.distributed.checkpoint, or with "
    "Llama's consolidated.NN.pth. Required.");
  v("to", to, "Folder for the result; made, must be empty. Required.");
  v("dtype", dtype, "Type of the written floating tensors; auto = as they are, float32 for GGUF.",
    {.choices = {"auto", "float32", "bfloat16", "float16"}});
  v("format", format,
    "full = files of Hugging Face; sharded = those of torch.distributed.checkpoint, in "
    "safetensors.",
    {.choices = {"full", "sharded"}});
  v("num_shards", num_shards, "Of the sharded format: the number of ranks' files.",
    {.min = 1, .max = 99999});
  v("max_shard_size", max_shard_size, "Of the full format: a new file begins at this size.");
  v("prefix", prefix,
    "Take only tensors whose names begin with this, and cut it off (\"model.\" of a trainer's "
    "checkpoint).");
}

template <class V>
void NewModelOptions::fields(V& v) {
  v.group("Random model");
  v("model_config", model_config, "A config.json of a Llama-family model. Required.",
    {.aliases = {"config_name"}});
  v("tokenizer", tokenizer,
    "Folder whose tokenizer files are copied; none = a model without tokenizer.",
    {.aliases = {"tokenizer_name"}});
  v("output_dir", output_dir, "Folder for the model; made, must be empty. Required.");
  v("dtype", dtype, "Type of the written weights.",
    {.choices = {"float32", "bfloat16", "float16"}});
  v("seed", seed, "Seed of the random weights.", {.min = 0});
}

template <class V>
void ShowDataOptions::fields(V& v) {
  v.group("Data");
  v("model_name_or_path", model_name_or_path, "Folder with the tokenizer. Required.",
    {.aliases = {"model_name"}});
  v("train_file", train_file, "Records, one JSON object a line. Required.",
    {.aliases = {"validation_file"}});
  sequence.fields(v);
  v("max_samples", max_samples, "Show so many sequences; 0 = all.", {.min = 0});
  v("json", json, "All sequences, one JSON object each: input_ids, labels, position_ids.");
  v("config", config, "A yaml file with any of these options; the command line wins over it.");
}

template <class V>
void VerifyOptions::fields(V& v) {
  v.group("Checkpoint");
  v("dir", dir,
    "Folder of a checkpoint, or one with several; may stand without its name. Required.");
  v("threads", threads, "Threads that read; 0 = one for each core, at most 16.",
    {.min = 0, .max = 1024});
  v("json", json, "One JSON object instead of lines.");
}

template <class V>
void EnvOptions::fields(V& v) {
  v.group("Output");
  v("json", json, "One JSON object instead of lines.");
}

}  // namespace fsdp::trainer
