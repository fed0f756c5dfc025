// Asynchronous operations: groups that a warp commits and waits for, and mbarriers.
#pragma once

#include "memory.h"

namespace ptx {

uint32_t agent_index(const Warp& w, AgentKind kind);
// Accesses of the warp's open group.
Actor async_actor(const Warp& w, AgentKind kind);
void commit_group(Warp& w, AgentKind kind, std::vector<CommitGroup>& groups, Mask lanes);
// Waits until at most `allowed` of the newest groups of each lane are unfinished.
void wait_groups(Warp& w, AgentKind kind, std::vector<CommitGroup>& groups, Mask lanes, uint32_t allowed);

Mbarrier& mbarrier_at(Warp& w, int lane, uint64_t addr, Space space);
void arrive(Warp& w, Mbarrier& b, int lane, uint32_t count, int64_t expect);
// The bytes of a copy count when it lands.
void land_later(Warp& w, Mbarrier& b, int64_t bytes);
// Writes that land when the current phase of the mbarrier ends.
Actor mbarrier_actor(const Mbarrier& b);

}  // namespace ptx
