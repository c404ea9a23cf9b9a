#!/usr/bin/env bash
# Every method on one annotation store, and one table of them all.
#
#   baselines/run_all.sh                                           built-in digits, seeds 0 1 2, into runs/compare
#   baselines/run_all.sh --jobs 8 --compute_matched                the same, and with as much computing as Co-Reg has
#   baselines/run_all.sh --annotations ann --recipe cifar10 --output_dir runs/cifar10
#   baselines/run_all.sh --annotations ann --only "zero_shot coop lora" --output_dir runs/few_shot
#   baselines/run_all.sh --annotations ann --recipe annotator --student "--backbone annotator --tuner adaptformer --head cosine"
#   baselines/run_all.sh --task multi                              several labels an image: built-in pictures of digits, into runs/tags
#
#   --task multi        the methods of baselines/spml.py, and what the annotator's tiles say without training; the default is single
#   --jobs K            runs at a time, one thread each (default 1)
#   --seeds "0 1 2"     of every method
#   --shots "1 4 16"    labels a class of the methods that need some; "" leaves them out
#   --compute_matched   further runs of each method with so many epochs that its networks make about as many passes as Co-Reg's
#   --refine "none own" the evidence that students are trained on, as it is, refined by the annotator's own features (own) or by a
#                       view, or several of these, each in runs of its own (default none)
#   --student "..."     further options of everything that trains a student, such as what of a backbone is tuned; the probe,
#                       which trains none, is left out then
#   --epochs N          epochs of all methods, all but one of which a longer warm-up gets (default: the recipe's)
#
# The run folder is the job: what is finished is skipped, what was stopped goes on. A run that fails is named at the end, and
# its output lies in OUTPUT_DIR/logs.
set -u

OUT="" RECIPE="" ANNOTATIONS="" JOBS=1 SEEDS="0 1 2" SHOTS="1 4 16" MATCHED=0 EPOCHS="" REFINE=none ONLY="" TUNING="" STUDENT="" ANY="" TASK=single
while (($#)); do
    case $1 in
    --compute_matched) MATCHED=1 && shift && continue ;;
    --output_dir | --recipe | --annotations | --jobs | --seeds | --shots | --epochs | --refine | --only | --tuning | --student | --task)
        (($# > 1)) || { echo "error: $1 needs a value after it" >&2 && exit 2; } ;;
    *) sed -n '2,/^set -u/{s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
    esac
    case $1 in
    --output_dir) OUT=$2 ;; --recipe) RECIPE=$2 ;; --annotations) ANNOTATIONS=$2 ;;
    --jobs) JOBS=$2 ;; --seeds) SEEDS=$2 ;; --shots) SHOTS=$2 ;; --epochs) EPOCHS=$2 ;;
    --refine) REFINE=$2 ;; --only) ONLY=$2 ;; --tuning) TUNING=$2 ;; --student) STUDENT=$2 ;; --task) TASK=$2 ;;
    esac
    shift 2
done

for evidence in $REFINE; do
    [[ $evidence =~ ^(none|own|view)$ ]] || { echo "error: --refine is $evidence; write none, own or view" >&2 && exit 2; }
done

case $TASK in
single) OUT=${OUT:-runs/compare} RECIPE=${RECIPE:-digits} ;;
multi) OUT=${OUT:-runs/tags} ;;
*) echo "error: --task is $TASK; write single or multi" >&2 && exit 2 ;;
esac

source "$(dirname "$0")/jobs.sh"

# run NAME MODULE OPTIONS...: start it if it is wanted
run() {
    local prefix wanted=""
    for prefix in ${ONLY:-""}; do [[ $1 == "$prefix"* ]] && wanted=yes; done
    [ -z "$wanted" ] || { ANY=yes && start "$@" --annotations "$ANNOTATIONS"; }
}

none_named() {
    [ -n "$ANY" ] || { echo "error: no run's name begins like one of --only \"$ONLY\"; --help shows them" >&2 && exit 2; }
}

if [ "$TASK" = multi ]; then
    if [ -z "$ANNOTATIONS" ]; then
        ANNOTATIONS=$OUT/annotations RECIPE=${RECIPE:-digit_pictures}
        "$PYTHON" -m annotate_vlm --images builtin:digit-pictures --tiles 2 --workers 0 --output_dir "$ANNOTATIONS" \
            >"$OUT/logs/annotate.log" 2>&1 || { tail -n 5 "$OUT/logs/annotate.log" >&2 && exit 1; }
    fi
    read -ra more <<<"${STUDENT//$'\n'/ }"
    student=(--recipe "${RECIPE:-folder}" --workers 0 ${EPOCHS:+--epochs "$EPOCHS"} "${more[@]}")
    run zero_shot_tags coreg.baselines.zero_shot_tags
    for seed in $SEEDS; do
        options=("${student[@]}" --seed "$seed")
        for method in bce bce_ls an wan an_ls n_ls iu l1r l2r pr epr role entmin em em_apl focal asl ll_r ll_ct ll_cp vlpl; do
            run "$method-$seed" coreg.baselines.spml "${options[@]}" --method "$method"
        done
        # what needs tiles fails in a store without them, and says so
        for evidence in tiles piaa; do
            run "vlpl_$evidence-$seed" coreg.baselines.spml "${options[@]}" --method vlpl --evidence "$evidence"
        done
        # no label at all: neither to learn from nor to choose an epoch by
        for evidence in image tiles ccd piaa; do
            run "soft_$evidence-$seed" coreg.baselines.spml "${options[@]}" --method soft --evidence "$evidence" --positives 0 --keep last
        done
    done
    none_named
    show_table
    exit
fi

# options of every method that trains a student, and of those that tune the annotator
read -ra more <<<"${STUDENT//$'\n'/ }"
student=(--recipe "$RECIPE" --workers 0 ${EPOCHS:+--epochs "$EPOCHS"} "${more[@]}")
tuning=(--workers 0)
if [ -z "$ANNOTATIONS" ]; then
    ANNOTATIONS=$OUT/annotations
    "$PYTHON" -m annotate_vlm --workers 0 --output_dir "$ANNOTATIONS" >"$OUT/logs/annotate.log" 2>&1 ||
        { tail -n 5 "$OUT/logs/annotate.log" >&2 && exit 1; }
    tuning+=(--preset digits)
fi
read -ra more <<<"$TUNING"
tuning+=("${more[@]}")
# of --epochs, that of the recipe may be too long a warm-up, which is refused
declare -A WARMUP=()
for module in ${EPOCHS:+train_coreg coreg.baselines.dividemix}; do
    own=$("$PYTHON" -m "$module" --recipe "$RECIPE" --print_config | sed -n 's/^warmup_epochs: //p')
    ((${own:-0} < EPOCHS)) || WARMUP[$module]="--warmup_epochs $((EPOCHS - 1))"
done
EPOCHS=${EPOCHS:-$("$PYTHON" -m train_coreg --recipe "$RECIPE" --print_config | sed -n 's/^epochs: //p')}

# methods that learn without labels, and the passes through a network that each image costs them in an epoch, a backward pass
# counted as two; those of Co-Reg and DivideMix, which depend on the schedule and on the division, were counted on the digits
COREG=36
declare -A PASSES=([kd_single]=3 [kd_averaged]=3 [dividemix_single]=25 [dividemix_averaged]=25 [cc]=3 [rc]=4 [proden]=3 [lws]=4
    [abs_mae]=3 [abs_gce]=3 [cavl]=4 [pop]=3 [lwc]=4 [cr_dpll]=9 [pico]=4 [pico_plus]=7 [irnet]=5 [alim_onehot]=7 [alim_scale]=7
    [able]=6 [idgp]=6 [solar]=10 [records]=12 [htc]=12)

# learn METHOD SEED [SUFFIX OPTIONS...]: one of them, on $evidence
learn() {
    local method=$1 seed=$2 command=()
    case $method in
    kd_*) command=(coreg.baselines.distill --teacher "${method#kd_}") ;;
    dividemix_*) command=(coreg.baselines.dividemix --labels_from "${method#dividemix_}") ;;
    *) command=(coreg.baselines.pll --method "$method") ;;
    esac
    run "$method${3:-}-$seed$mark" "${command[@]}" ${WARMUP[${command[0]}]:-} "${student[@]}" --refine "$evidence" --seed "$seed" "${@:4}"
}

run zero_shot coreg.baselines.zero_shot
for seed in $SEEDS; do
    for shots in $SHOTS; do
        run "coop_$shots-$seed" coreg.baselines.coop "${tuning[@]}" --seed "$seed" --shots "$shots"
        run "lora_$shots-$seed" coreg.baselines.lora "${tuning[@]}" --seed "$seed" --shots "$shots"
    done
    evidence=none mark="" learn supervised "$seed" # true labels are not refined
    for evidence in $REFINE; do
        mark=$([ "$evidence" = none ] || echo "-$evidence")
        options=("${student[@]}" --refine "$evidence" --seed "$seed")
        run "coreg-$seed$mark" train_coreg ${WARMUP[train_coreg]:-} "${options[@]}"
        for targets in $([ -n "$STUDENT" ] || echo probabilities sets); do
            run "probe_$targets-$seed$mark" coreg.baselines.probe "${options[@]}" --targets "$targets"
        done
        for method in "${!PASSES[@]}"; do learn "$method" "$seed"; done
        for shots in $SHOTS; do run "coreg_$shots-$seed$mark" train_coreg ${WARMUP[train_coreg]:-} "${options[@]}" --few_shot "$shots"; done
        if ((MATCHED)); then
            for method in "${!PASSES[@]}"; do
                learn "$method" "$seed" -matched --epochs $((EPOCHS * COREG / PASSES[$method]))
            done
        fi
    done
done
none_named
show_table
