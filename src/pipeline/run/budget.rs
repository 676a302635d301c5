//! A stage with a budget in minutes: minutes become a number of users before it starts.
//!
//! In: the stage, minutes, the rate of earlier nights. Out: its record, with the number that the minutes became.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Done, Run};
use crate::error::{Error, Result};
use crate::pipeline::StageNode;
use crate::pipeline::minutes::{self, remembered};
use crate::stages::{ModelFile, Observer, Stage};

impl Run<'_> {
    /// A stage with a budget in minutes: as a number of users, by the rate of earlier nights or of a few users asked now.
    pub(super) async fn within(
        &self,
        node: &StageNode,
        minutes: f64,
        (models, observer): (BTreeMap<String, ModelFile>, Arc<dyn Observer>),
        forced: bool,
    ) -> Result<Done> {
        let name = &self.pipeline.name;
        let around = (&self.known, &models);
        if !forced
            && let Some((record, users)) = remembered(&self.cache, &self.nights, name, node, around, minutes).await?
            && !record.ask_again()
        {
            return Ok(Done { budget: Some((minutes, users)), ..Done::found(record) });
        }
        let models_again = models.clone();
        let ctx = self.context(node, models, observer.clone()).await?;
        let mut rate = minutes::recorded(&self.nights, name, &node.name);
        if let (Some(shard), None) = (self.shard, rate) {
            return Err(Error::usage(format!("--shard {shard}: no night has recorded how fast `{}` is asked", node.name))
                .with_help("without a rate each share would take another number of users; run one night without --shard first, or set budget.users"));
        }
        let mut pilot = minutes::PILOT;
        let everyone = node.stage.users_within(&ctx, f64::MAX).await?;
        while rate.is_none() && pilot / 2 < everyone {
            let stage = self.for_users(node, pilot)?;
            let identity = self.identity(node, stage.as_ref(), &models_again)?;
            let record = match self.found(&identity).await? {
                Some(record) => record,
                None => self.work(node, stage.as_ref(), &ctx).await?,
            };
            rate = minutes::measured(&record);
            pilot *= 2;
        }
        // Whoever is left was answered before: asking costs nothing.
        let users = match rate {
            Some(rate) => node.stage.users_within(&ctx, rate * minutes * 60.0).await?,
            None => everyone,
        };
        let rate = rate.map_or_else(String::new, |rate| format!(" at {rate:.0} prompt tokens per second"));
        observer.note(&format!("{minutes} minutes are {users} of {everyone} users{rate}"));
        let stage = self.for_users(node, users)?;
        let identity = self.identity(node, stage.as_ref(), &models_again)?;
        let budget = Some((minutes, users));
        if !forced && let Some(record) = self.found(&identity).await? {
            return Ok(Done { budget, ..Done::found(record) });
        }
        let record = self.work(node, stage.as_ref(), &ctx).await?;
        Ok(Done { budget, ..Done::made(record) })
    }

    fn for_users(&self, node: &StageNode, users: u64) -> Result<Box<dyn Stage>> {
        node.stage.for_users(users).ok_or_else(|| Error::internal(format!("`{}` asks nobody", node.name)))
    }
}
