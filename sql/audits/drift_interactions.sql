-- Population stability index of N(u), the users' numbers of interactions, tonight against the partition before:
-- sum over bins of (p - q) ln(p / q), with p and q the shares of a bin tonight and before, at least .0001 each. Bins are
-- the tenths of the partition before (equal values in one bin) and what lies below all of it. 0: no drift; above .25 it
-- is usually called a shift. Give a `max`.
with tonight as (
    select cast(max(interactions) as double) as x from recommendations group by user_id
),
earlier as (
    select cast(max(interactions) as double) as x from previous group by user_id
),
tenths as (select x, ntile(10) over (order by x) as tenth from earlier),
edges as (
    select distinct edge
    from (
        select max(x) as edge from tenths where tenth < 10 group by tenth
        union all
        select min(x) - 1e-9 * (1.0 + abs(min(x))) as edge from earlier
        union all
        select 1.7976931348623157e308 as edge
    )
    where edge is not null
),
up_to as (
    select
        edges.edge,
        (select count(*) from tonight) as n_p,
        (select count(*) from earlier) as n_q,
        p.below as p,
        q.below as q
    from edges
    join (select edge, sum(case when x <= edge then 1 else 0 end) as below from edges cross join tonight group by edge) p
        on edges.edge = p.edge
    join (select edge, sum(case when x <= edge then 1 else 0 end) as below from edges cross join earlier group by edge) q
        on edges.edge = q.edge
),
bins as (
    select
        greatest((p - lag(p, 1, 0) over (order by edge)) / cast(n_p as double), 0.0001) as p,
        greatest((q - lag(q, 1, 0) over (order by edge)) / cast(n_q as double), 0.0001) as q
    from up_to
)
select sum((p - q) * ln(p / q)) as value from bins
