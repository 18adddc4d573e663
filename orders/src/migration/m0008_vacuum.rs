//! Each order is updated once, when it becomes final, and leaves an entry in the index of NEW
//! orders, which every scan reads until a vacuum. By default a vacuum waits for a fifth of the
//! table.

pub(super) const UP: &str = "
ALTER TABLE orders SET (autovacuum_vacuum_scale_factor = 0.02,
                        autovacuum_vacuum_threshold = 10000,
                        autovacuum_analyze_scale_factor = 0.02)";
