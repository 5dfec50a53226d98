#!/usr/bin/env bash
# Launch N processes of one run on this host, with one GPU per process if there are GPUs:
#
#     scripts/launch_local.sh N train.py --config ... --workdir ...
#
# Ctrl-C and SIGTERM are forwarded to all processes. If one fails, the others usually exit by
# themselves, and are killed after 45 seconds. The exit code is that of the first that failed.
set -u
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: scripts/launch_local.sh N train.py --config ... --workdir ..." >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$count
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | wc -l)
fi
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$count" ]; then
  echo "error: $count processes need one GPU each, but there are only $gpus GPUs" >&2
  exit 2
fi

pids=()
for ((id = 0; id < count; id++)); do
  if [ "$gpus" -gt 0 ]; then export JAX_LOCAL_DEVICE_IDS=$id; fi
  JAX_PROCESS_ID=$id "$python" "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

code=0
failed=
declare -A left
for id in "${!pids[@]}"; do left[$id]=${pids[$id]}; done
while [ "${#left[@]}" -gt 0 ]; do
  for id in "${!left[@]}"; do
    kill -0 "${left[$id]}" 2>/dev/null && continue
    wait "${left[$id]}"
    status=$?
    unset "left[$id]"
    [ "$status" -eq 0 ] && continue
    echo "process $id of $count exited with code $status" >&2
    if [ "$code" -eq 0 ]; then
      code=$status
      failed=$SECONDS
    fi
  done
  if [ -n "$failed" ] && [ "$((SECONDS - failed))" -ge 45 ] && [ "${#left[@]}" -gt 0 ]; then
    kill -KILL "${left[@]}" 2>/dev/null
  fi
  sleep 0.2
done
exit "$code"
