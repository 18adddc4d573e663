"""Hooks for schemathesis: what an OpenAPI document cannot express."""

import re
import uuid

import schemathesis

KEY = "Idempotency-Key"
WELL_FORMED = re.compile(r"[!#-~]([ -~]*[!-~])?")


@schemathesis.hook
def before_call(context, case, kwargs):
    # Another request under a used key is rejected (422). So every well-formed key is made unique;
    # malformed keys are sent unchanged and must be rejected.
    key = (case.headers or {}).get(KEY)
    if isinstance(key, str) and len(key) <= 255 and WELL_FORMED.fullmatch(key):
        case.headers[KEY] = key[:200] + "." + uuid.uuid4().hex
    # In JSON Schema, 7.0 is an integer. The API accepts only amounts without a fraction.
    if isinstance(case.body, dict) and isinstance(case.body.get("amount"), float) and case.body["amount"].is_integer():
        case.body["amount"] = int(case.body["amount"])
