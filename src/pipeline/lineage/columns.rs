//! Which columns of its inputs each column of a query comes from, read off DataFusion's logical plan.
//!
//! In: a plan. Out: for every output column the table columns that it is made of, and whether it is one of them as it
//! is, a sum over rows, or computed. Conditions (`where`, `on`, `order by`) are not told: only what the value is made of.

use std::collections::BTreeMap;

use datafusion::common::Column;
use datafusion::logical_expr::{Expr, JoinType, LogicalPlan};

/// How a value comes from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// It is that value.
    Identity,
    /// It is computed from it.
    Transformation,
    /// It is computed from it over several rows.
    Aggregation,
}

impl How {
    /// OpenLineage's word.
    pub fn as_str(self) -> &'static str {
        match self {
            How::Identity => "IDENTITY",
            How::Transformation => "TRANSFORMATION",
            How::Aggregation => "AGGREGATION",
        }
    }
}

/// Table and column, and how the value comes from it. Of two ways the one that does more to it stays.
pub type Origins = BTreeMap<(String, String), How>;

/// Output column -> where it comes from, in the order of the output. A column that comes from no table has no origins,
/// and so has one behind an operator whose columns cannot be followed.
pub fn column_origins(plan: &LogicalPlan) -> Vec<(String, Origins)> {
    let schema = plan.schema();
    (0..schema.fields().len()).map(|i| (schema.field(i).name().clone(), origins(plan, i))).collect()
}

fn origins(plan: &LogicalPlan, at: usize) -> Origins {
    match plan {
        LogicalPlan::TableScan(scan) => {
            let column = scan.projected_schema.field(at).name().clone();
            Origins::from([((scan.table_name.table().to_owned(), column), How::Identity)])
        }
        LogicalPlan::Projection(projection) => of_expr(projection.expr.get(at), &projection.input, How::Identity),
        LogicalPlan::Aggregate(aggregate) => {
            let groups = aggregate.group_expr.len();
            match at < groups {
                true => of_expr(aggregate.group_expr.get(at), &aggregate.input, How::Identity),
                false => of_expr(aggregate.aggr_expr.get(at - groups), &aggregate.input, How::Aggregation),
            }
        }
        LogicalPlan::Window(window) => {
            let before = window.input.schema().fields().len();
            match at < before {
                true => origins(&window.input, at),
                false => of_expr(window.window_expr.get(at - before), &window.input, How::Aggregation),
            }
        }
        LogicalPlan::Join(join) => match join.join_type {
            JoinType::RightSemi | JoinType::RightAnti => origins(&join.right, at),
            _ => {
                let left = join.left.schema().fields().len();
                if at < left { origins(&join.left, at) } else { origins(&join.right, at - left) }
            }
        },
        LogicalPlan::Union(union) => {
            union.inputs.iter().fold(Origins::new(), |so_far, input| merged(so_far, origins(input, at)))
        }
        LogicalPlan::SubqueryAlias(alias) => origins(&alias.input, at),
        LogicalPlan::Filter(filter) => origins(&filter.input, at),
        LogicalPlan::Sort(sort) => origins(&sort.input, at),
        LogicalPlan::Limit(limit) => origins(&limit.input, at),
        LogicalPlan::Repartition(repartition) => origins(&repartition.input, at),
        LogicalPlan::Distinct(distinct) => {
            match distinct.input().schema().fields().len() == plan.schema().fields().len() {
                true => origins(distinct.input(), at),
                false => Origins::new(),
            }
        }
        _ => Origins::new(),
    }
}

fn of_expr(expr: Option<&Expr>, input: &LogicalPlan, otherwise: How) -> Origins {
    let Some(mut expr) = expr else { return Origins::new() };
    while let Expr::Alias(alias) = expr {
        expr = &alias.expr;
    }
    if let Expr::Column(column) = expr {
        return of_column(column, input);
    }
    let how = otherwise.max(How::Transformation);
    expr.column_refs().into_iter().fold(Origins::new(), |so_far, column| {
        let deeper = of_column(column, input).into_iter().map(|(from, was)| (from, was.max(how))).collect();
        merged(so_far, deeper)
    })
}

fn of_column(column: &Column, input: &LogicalPlan) -> Origins {
    input.schema().maybe_index_of_column(column).map_or_else(Origins::new, |at| origins(input, at))
}

fn merged(mut a: Origins, b: Origins) -> Origins {
    for (from, how) in b {
        a.entry(from).and_modify(|h| *h = (*h).max(how)).or_insert(how);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query::plan_against;
    use arrow::datatypes::{DataType, Field, Schema};
    use std::sync::Arc;

    async fn of(sql: &str) -> Vec<String> {
        let field = |n: &str, t| Field::new(n, t, true);
        let log = Schema::new(vec![
            field("user_id", DataType::Int64),
            field("item_id", DataType::Int64),
            field("rating", DataType::Float32),
        ]);
        let items = Schema::new(vec![field("item_id", DataType::Int64), field("title", DataType::Utf8)]);
        let frame = plan_against(&[("log", Arc::new(log)), ("items", Arc::new(items))], sql).await.unwrap();
        column_origins(frame.logical_plan())
            .into_iter()
            .map(|(name, from)| {
                let from: Vec<String> =
                    from.iter().map(|((t, c), how)| format!("{t}.{c}:{}", &how.as_str()[..1])).collect();
                format!("{name} <- {}", from.join(" "))
            })
            .collect()
    }

    #[tokio::test]
    async fn columns_are_followed() {
        let plain = "select l.user_id as u, i.title, rating * 2 as twice, 1 as one from log l left join items i \
                     on l.item_id = i.item_id where rating > 1 order by u limit 3";
        assert_eq!(
            of(plain).await,
            ["u <- log.user_id:I", "title <- items.title:I", "twice <- log.rating:T", "one <- "]
        );
        let grouped = "with best as (select user_id, max(rating) m, count(*) n from log group by user_id) \
                       select user_id, m + 1 as more, n from best";
        assert_eq!(of(grouped).await, ["user_id <- log.user_id:I", "more <- log.rating:A", "n <- "]);
        let both = "select item_id from log union all select item_id from items";
        assert_eq!(of(both).await, ["item_id <- items.item_id:I log.item_id:I"]);
        let window = "select *, row_number() over (partition by user_id order by rating) r from log";
        let found = of(window).await;
        assert_eq!(found[..3], ["user_id <- log.user_id:I", "item_id <- log.item_id:I", "rating <- log.rating:I"]);
        assert!(found[3].contains("log.rating:A") && found[3].contains("log.user_id:A"), "{found:?}");
        let distinct = "select distinct user_id from log where item_id in (select item_id from items)";
        assert_eq!(of(distinct).await, ["user_id <- log.user_id:I"]);
    }
}
