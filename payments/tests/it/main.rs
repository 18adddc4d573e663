//! Tests of the payments service against a real PostgreSQL and a real NATS.

mod openapi;
