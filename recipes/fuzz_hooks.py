"""Hooks for schemathesis: what an OpenAPI document cannot say of this API."""

import re
import uuid

import schemathesis

KEY = "Idempotency-Key"
WELL_FORMED = re.compile(r"[!#-~]([ -~]*[!-~])?")


@schemathesis.hook
def before_call(context, case, kwargs):
    # A key names one intent, and another request under the same key is refused (422). Each request is an intent of its
    # own here, so each well-formed key is made unique; malformed ones stay as they are and must be refused.
    key = (case.headers or {}).get(KEY)
    if isinstance(key, str) and len(key) <= 255 and WELL_FORMED.fullmatch(key):
        case.headers[KEY] = key[:200] + "." + uuid.uuid4().hex
    # To JSON Schema 7.0 is an integer. Here an amount is written as one, or refused.
    if isinstance(case.body, dict) and isinstance(case.body.get("amount"), float) and case.body["amount"].is_integer():
        case.body["amount"] = int(case.body["amount"])
