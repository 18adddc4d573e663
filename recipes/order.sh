#!/usr/bin/env bash
# Places one order as a client would, step by step: account, deposit, order, final status.
#   recipes/order.sh GATEWAY_URL USER AMOUNT
# NO_DEPOSIT=1 deposits nothing, to show that an order without money is cancelled.
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

[ $# -eq 3 ] || fail "usage: recipes/order.sh GATEWAY_URL USER AMOUNT"
gateway=${1%/} user=$2 amount=$3
# Both are inserted into URLs and JSON without quoting.
[[ $user =~ ^[A-Za-z0-9._-]{1,64}$ ]] ||
  fail "the user must be 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' or '-', not '$user'"
[[ $amount =~ ^[1-9][0-9]{0,12}$ ]] ||
  fail "the amount must be a positive whole number of minor units (1299 for 12.99), not '$amount'"
for program in curl python3; do
  command -v "$program" >/dev/null || fail "$program is not found: install it"
done

answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

call() { # call METHOD PATH [BODY [KEY]]: prints the request and sets $status
  local options=(--silent --max-time 35 --output "$answer" --write-out '%{http_code}' --request "$1")
  [ -z "${3:-}" ] || options+=(--header 'Content-Type: application/json' --data "$3")
  [ -z "${4:-}" ] || options+=(--header "Idempotency-Key: $4")
  printf '%-4s %s%s%s\n' "$1" "$2" "${3:+ $3}" "${4:+  Idempotency-Key: $4}"
  status=$(curl "${options[@]}" "$gateway$2") ||
    fail "the gateway does not answer at $gateway: ./dev up starts everything, ./dev status shows what runs"
}
field() { # field NAME: of the last answer; empty if it has none
  python3 -c '
import json, sys
try:
    value = json.load(open(sys.argv[1])).get(sys.argv[2])
except (ValueError, AttributeError):
    value = None
print("" if value is None else value)' "$answer" "$1"
}
said() { printf '     %s %s\n' "$status" "$*"; }
refused() { fail "$1: $status $(field detail)"; }
new_key() { python3 -c 'import uuid; print(uuid.uuid4())'; }

fill_account() {
  call POST /v1/accounts "{\"user_id\":\"$user\"}"
  case $status in
    201) said "opened" ;;
    409) said "exists already" ;;
    # Orders are accepted while payments is down, so go on.
    503) said "$(field detail)"; return ;;
    *) refused "the account cannot be opened" ;;
  esac
  call GET "/v1/accounts/$user"
  [ "$status" = 200 ] || refused "the balance cannot be read"
  local balance
  balance=$(field balance)
  said "balance $balance"
  if [ "${NO_DEPOSIT:-}" = 1 ] || [ "$balance" -ge "$amount" ]; then return; fi
  call POST "/v1/accounts/$user/deposits" "{\"amount\":$((amount - balance))}" "$(new_key)"
  [ "$status" = 201 ] || refused "the money cannot be deposited"
  said "balance $(field balance)"
}
fill_account

call POST /v1/orders "{\"user_id\":\"$user\",\"amount\":$amount}" "$(new_key)"
[ "$status" = 201 ] || refused "the order was not placed"
id=$(field id)
said "$(field status)"

call GET "/v1/orders/$id?wait=20"
[ "$status" = 200 ] || refused "order $id was placed but cannot be read"
state=$(field status) reason=$(field reason)
said "$state"
case $state in
  FINISHED | CANCELLED) ;;
  *) fail "order $id is still $state after 20 seconds. It is not lost: it becomes final once" \
    "everything runs (./dev status)" ;;
esac

call GET "/v1/accounts/$user"
if [ "$status" = 200 ]; then balance=$(field balance); else balance=unknown; fi
said "balance $balance"
echo "Order $id is $state${reason:+ ($reason)}. The balance of $user is $balance."
