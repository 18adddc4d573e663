//! When an order was stored, by the clock of the database: no other clock decides whether it is late.

/// Rewrites no rows: existing orders count as stored now.
pub(super) const UP: &str =
    "ALTER TABLE orders ADD COLUMN stored_at timestamptz NOT NULL DEFAULT now()";
