//! Accounts are few and updated all the time. Room in each page keeps an update in its page, so
//! that no index changes and reads clean up behind the writes; a vacuum need not wait for a fifth
//! of the table.

pub(super) const UP: &str = "
ALTER TABLE accounts SET (fillfactor = 70,
                          autovacuum_vacuum_scale_factor = 0.05,
                          autovacuum_vacuum_threshold = 1000)";
