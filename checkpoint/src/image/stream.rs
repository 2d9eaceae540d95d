//! The stream of pages and state.
