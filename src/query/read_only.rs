//! Which statements are run at all: one, and one that reads.
//!
//! In: SQL text. Out: a planned query, or an error that names the statement. Two fences: the
//! parsed statement (so that the message says what was typed) and the plan.

use datafusion::dataframe::DataFrame;
use datafusion::prelude::{SQLOptions, SessionContext};
use datafusion::sql::parser::{DFParser, Statement};
use datafusion::sql::sqlparser::ast::Statement as Ast;

use crate::error::{Error, Fault, Result};
use crate::tables::sql_errors::from_datafusion;

/// Plans `sql` in `ctx`. Errors carry exit 78, as a stage's SQL is part of the pipeline file
/// ([`as_usage`](crate::tables::sql_errors::as_usage) makes it 2 for the command line), except
/// a statement that would write, which is exit 2 everywhere: syntax, several statements, unknown
/// tables and columns with DataFusion's suggestion.
pub async fn plan_query(ctx: &SessionContext, sql: &str) -> Result<DataFrame> {
    let statement = parse(sql)?;
    let plan = ctx.state().statement_to_plan(statement).await.map_err(from_datafusion)?;
    let read_only = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    read_only.verify_plan(&plan).map_err(|e| refused(&e.strip_backtrace()))?;
    ctx.execute_logical_plan(plan).await.map_err(from_datafusion)
}

/// Checks `sql` without any table at hand: it parses, is one statement, and reads.
pub fn check(sql: &str) -> Result<()> {
    parse(sql).map(|_| ())
}

fn parse(sql: &str) -> Result<Statement> {
    let mut statements = DFParser::parse_sql(sql).map_err(from_datafusion).map_err(|e| e.at("SQL"))?;
    let Some(statement) = statements.pop_front() else {
        return Err(
            Error::spec("SQL: there is no statement").with_help("write for example: select * from NAME limit 10")
        );
    };
    // A writing statement is named even where it hides behind a reading one.
    for any in std::iter::once(&statement).chain(&statements) {
        if !reads(any) {
            return Err(refused(&verb(any)));
        }
    }
    match statements.len() {
        0 => Ok(statement),
        more => Err(Error::spec(format!("SQL: there are {} statements, one is run", more + 1))
            .with_help("leave one, without anything after its `;`")),
    }
}

/// Queries, and what explains or describes them.
fn reads(statement: &Statement) -> bool {
    match statement {
        Statement::Statement(ast) => match ast.as_ref() {
            Ast::Explain { statement, .. } => matches!(statement.as_ref(), Ast::Query(_)),
            Ast::Query(_)
            | Ast::ExplainTable { .. }
            | Ast::ShowTables { .. }
            | Ast::ShowColumns { .. }
            | Ast::ShowVariable { .. }
            | Ast::ShowFunctions { .. } => true,
            _ => false,
        },
        Statement::Explain(explain) => reads(&explain.statement),
        Statement::CreateExternalTable(_) | Statement::CopyTo(_) | Statement::Reset(_) => false,
    }
}

/// The first words of a statement, in capitals: `CREATE TABLE`, `INSERT INTO`, `SET`.
fn verb(statement: &Statement) -> String {
    let text = statement.to_string();
    let words = text.split_whitespace().take_while(|w| w.chars().all(|c| c.is_ascii_uppercase()));
    let verb = words.take(3).collect::<Vec<_>>().join(" ");
    match verb.is_empty() {
        true => text.split_whitespace().next().unwrap_or("the statement").to_owned(),
        false => verb,
    }
}

fn refused(what: &str) -> Error {
    Error::new(Fault::Usage, format!("`{what}` is refused: SQL only reads here"))
        .with_help("select, show, describe and explain are allowed; a table is published by a `write` stage")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reads_is_allowed() {
        for sql in [
            "select 1",
            "select 1;",
            "with x as (select 1 as a) select * from x",
            "values (1), (2)",
            "explain select 1",
            "explain analyze select 1",
            "show tables",
            "describe t",
            "show columns from t",
            "(select 1) union all select 2",
        ] {
            assert!(check(sql).is_ok(), "{sql}: {}", check(sql).unwrap_err());
        }
    }

    #[test]
    fn what_writes_is_refused_by_name() {
        for (sql, name) in [
            ("create table t as select 1", "CREATE TABLE"),
            ("create view v as select 1", "CREATE VIEW"),
            ("create external table t stored as csv location '/tmp/x'", "CREATE EXTERNAL TABLE"),
            ("insert into t values (1)", "INSERT INTO"),
            ("copy (select 1) to '/tmp/x.csv'", "COPY"),
            ("drop table t", "DROP TABLE"),
            ("delete from t", "DELETE FROM"),
            ("update t set a = 1", "UPDATE"),
            ("truncate table t", "TRUNCATE TABLE"),
            ("set datafusion.execution.batch_size = 1", "SET"),
            ("explain insert into t values (1)", "EXPLAIN INSERT INTO"),
            ("select 1; drop table t", "DROP TABLE"),
            ("begin transaction", "BEGIN TRANSACTION"),
        ] {
            let e = check(sql).expect_err(sql);
            assert_eq!(e.fault, Fault::Usage, "{sql}: {e}");
            assert!(e.message.starts_with(&format!("`{name}")), "{sql}: {e}");
        }
    }

    #[test]
    fn one_statement() {
        let e = check("select 1; select 2").unwrap_err();
        assert!(e.message.contains("2 statements"), "{e}");
        assert!(check("  ").unwrap_err().message.contains("no statement"));
        assert_eq!(check("selec 1").unwrap_err().fault, Fault::Spec);
    }
}
