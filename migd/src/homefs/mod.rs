//! The home file system: home's files, directories, pipes and terminals as the root of a guest.
//!
//! ```mermaid
//! sequenceDiagram
//!     participant G as guest
//!     participant K as host's kernel
//!     participant V as HostView
//!     participant H as HomeView
//!     G->>K: open, read, write, stat …
//!     K->>V: FUSE request (read of /dev/fuse)
//!     V->>H: the same bytes (Wire)
//!     H->>H: done under the caller's user and groups
//!     H->>V: FUSE reply
//!     V->>K: the same bytes (write to /dev/fuse)
//! ```
//!
//! The host's side ([`HostView`]) reads requests from `/dev/fuse` and sends them as they are; home
//! ([`HomeView`]) takes them apart, does them, and its reply goes to the kernel as it is. Only INIT,
//! DESTROY and one private ioctl ([`handle_of`]) are answered on the host. So there is one truth, at
//! home: no copy of a file, and no decision, is made on the host.
//!
//! What this step does on purpose:
//! * **Nothing is cached beyond one open** (time-outs of 0, no KEEP_CACHE, write-through): what
//!   anybody at home does is seen by the guest's next call. Caching needs leases from home; with
//!   time-outs and without leases an append at home left a guest at the old size and data.
//! * **Home checks permissions, the mount does not** (no `default_permissions`): each path component
//!   is looked up at home under the caller's ids, with home's ACLs, which the host's kernel could
//!   only guess at; with time-outs of 0 it would also cost a GETATTR for each component. When names
//!   are cached one day, `default_permissions` has to come back.
//! * **Pipes and terminals** are regular files to the host's kernel (it would otherwise open a pipe
//!   or terminal of its own), opened with direct I/O and as streams; data is read at home only when
//!   the guest reads.
//! * **Locks, and calls that are not about files,** are not here: they are made at home.
//!
//! What it does not do: it starts no connection (see [`Wire`]), knows no node and no guest, and never
//! unmounts: the mount belongs to whoever made it.

pub mod abi;
pub mod home;
pub mod host;

use std::io;

pub use checkpoint::sys::fuse_device::handle_of;
pub use home::{HandleKind, HomeView, inode_path, token_path};
pub use host::{HostHooks, HostView, InterruptReply, device_of};

/// One direction of a connection between the two views: frames given to [`Wire::send`] come out, in
/// order, at the other side's `deliver`.
pub trait Wire: Send + Sync {
    /// Sends one frame; may block for back-pressure. An error means that the connection is lost.
    fn send(&self, frame: &[u8]) -> io::Result<()>;
}
