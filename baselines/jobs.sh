# Sourced by run_all.sh and flips.sh, not run: several jobs at a time, each with a folder below $OUT and a log in $OUT/logs.

VENV=$(dirname "${BASH_SOURCE[0]}")/../.venv
PYTHON=${PYTHON:-$([ -x "$VENV/bin/python" ] && echo "$VENV/bin/python" || echo python)}
# one thread a run: the last digits of sums depend on the number of threads, and threads of several runs get in each other's way
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$OUT/logs" || exit 2
STARTED=()
# runs that are stopped write a checkpoint first
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM

# zero_shot and zero_shot_tags have a report for each of their variants
finished() { [ -f "$OUT/$1/report.json" ] || [ -f "$OUT/$1/averaged/report.json" ] || [ -f "$OUT/$1/image/report.json" ]; }

# start NAME MODULE OPTIONS...: start it in the background as soon as fewer than JOBS are running, unless it is finished
start() {
    local name=$1 && shift
    finished "$name" && return
    while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
    echo "$(date +%T) $name"
    "$PYTHON" -m "$@" --output_dir "$OUT/$name" >"$OUT/logs/$name.log" 2>&1 &
    STARTED+=("$name")
}

# wait for all of them, show the table, and exit with 1 if a run failed
show_table() {
    wait
    "$PYTHON" -m coreg.report "$OUT"
    "$PYTHON" -m coreg.report "$OUT" --format html --output "$OUT/compare.html"
    local failed=() name
    for name in "${STARTED[@]}"; do finished "$name" || failed+=("$name"); done
    if ((${#failed[@]})); then
        echo "failed, see $OUT/logs: ${failed[*]}" >&2
        exit 1
    fi
}
