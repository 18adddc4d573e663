//! Tests of the orders service against a real PostgreSQL and a real NATS.

mod openapi;
