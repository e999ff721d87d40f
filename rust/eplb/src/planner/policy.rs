//! What a planner is told: how to plan, and what to make of groups.

/// How a placement is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Policy {
    /// DeepSeek's EPLB, exactly: greedy replication and packing, `f32` sums, stable sorts.
    DeepSeek,
    /// Replica counts and packing improved together by local search.
    #[default]
    Balanced,
    /// What engines start from: slot `i` holds expert `i mod num_experts`, whatever the load.
    Trivial,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 3] = [Self::Balanced, Self::DeepSeek, Self::Trivial];

    /// The name it goes by in Python and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::DeepSeek => "deepseek",
            Self::Trivial => "trivial",
        }
    }

    /// The policy of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// What [`Policy::Balanced`] makes of groups of experts. A model with one group has no rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GroupRule {
    /// All replicas of a group stay on one node.
    #[default]
    Strict,
    /// A group has a home, the node that serves most of its tokens, and may leave it at a
    /// [price](crate::Planner::with_crossing_cost).
    Priced,
    /// Any expert may be anywhere.
    Free,
}

impl GroupRule {
    /// All rules.
    pub const ALL: [Self; 3] = [Self::Strict, Self::Priced, Self::Free];

    /// The name it goes by in Python and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Priced => "priced",
            Self::Free => "free",
        }
    }

    /// The rule of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == name)
    }
}
