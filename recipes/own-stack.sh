# To be sourced by recipes after tools.sh: starts a stack with its own folder and ports.
target=${CARGO_TARGET_DIR:-target}
stack=()

own_stack() { # sets $url, $folder and $offset; the stack is deleted when this script exits
  cargo build --locked --workspace --bins --quiet
  folder=$(mktemp -d)
  chmod 755 "$folder"
  trap 'end_stack' EXIT
  local try
  for try in 1 2 3 4 5; do
    offset=$((1000 + RANDOM % 10000))
    stack=("$target/debug/stack" --dir "$folder" --port-offset "$offset")
    if "${stack[@]}" up --detach >"$folder/up" 2>&1; then
      url=http://127.0.0.1:$((8080 + offset))
      return
    fi
    grep -q "is taken" "$folder/up" || break
  done
  cat "$folder/up" >&2
  fail "a stack could not be started (try $try)"
}
end_stack() {
  "${stack[@]}" down >/dev/null || true
  rm -rf "$folder"
}
