-- The views, in standard SQL that DuckDB and PostgreSQL both accept. A line of dashes separates them.

create view latest_attempts as
select * from (
  select a.*, row_number() over (partition by home, run_id order by attempt desc) as recency,
         count(*) over (partition by home, run_id) as attempts
  from attempts a
) ranked
where recency = 1
---
create view metrics_latest as
-- Rank only runs with a second attempt: ranking every row takes seconds for ten million of them.
with repeated as (select distinct home, run_id from metrics where attempt > 1)
select m.home, m.run_id, m.attempt, m.event, m.time, m.step, m.name, m.value from metrics m
where not exists (select 1 from repeated r where r.home = m.home and r.run_id = m.run_id)
union all
select home, run_id, attempt, event, time, step, name, value from (
  select m.*,
         row_number() over (partition by m.home, m.run_id, event, step, name order by attempt desc, time desc)
           as recency
  from metrics m
  join repeated r on r.home = m.home and r.run_id = m.run_id
) ranked
where recency = 1
---
create view results as
with cores as (
  select e.home, e.run_id, e.core, e.core_error, e.metric, e.mode, e.bundle, e.tokenizer,
         row_number() over (
           partition by e.home, e.run_id
           order by case e.metric when 'core' then 0 when 'pocket-core' then 1 else 2 end, e.metric,
                    case e.mode when 'full' then 0 else 1 end,
                    case when e.max_per_task is null then 0 else 1 end, e.max_per_task desc, e.time desc, e.evaluation
         ) as recency
  from evaluations e
  join finished f on f.home = e.home and f.run_id = e.run_id and f.step = e.step
  where e.core is not null and position('tasks ' in e.mode) = 0
)
select
  r.home, r.run_id, 'run' as source, cast(null as varchar) as label, r.recipe, r.depth, r.seed, r.horizon,
  case
    when f.run_id is not null then 'finished'
    when a.reason in ('interrupted', 'diverged', 'cancelled') then a.reason
    when a.ended is not null then 'failed'
    when a.run_id is not null then 'running'
    else 'planned'
  end as status,
  case when f.run_id is null then a.reason end as reason,
  cast(null as varchar) as flags, true as usable,
  r.parameters_wte, r.parameters_value_embeds, r.parameters_lm_head, r.parameters_matrices, r.parameters_scalars,
  r.parameters_scaling, r.parameters_total, cast(r.flops_per_token as double precision) as flops_per_token,
  r.tokens_asked, r.tokens as tokens_planned, r.flops as flops_planned, r.batch_tokens, r.steps, r.epochs,
  f.tokens, f.flops, f.train_loss, f.val_loss, f.val_bpb, coalesce(c.core, f.core) as core, c.core_error,
  case when c.core is not null then c.metric when f.core is not null then 'core' end as core_metric,
  case when c.core is not null then c.mode when f.core is not null then 'full' end as core_mode,
  case
    when c.core is not null then
      'metric=' || c.metric || coalesce(' bundle=' || c.bundle, '') || coalesce(' mode=' || replace(c.mode, ' ', '_'), '')
      || coalesce(' tokenizer=' || c.tokenizer, '') || ' context=' || cast(r.sequence_length as varchar)
    when f.core is not null then
      'metric=core mode=full tokenizer=' || r.tokenizer || ' context=' || cast(r.sequence_length as varchar)
  end as core_key,
  f.train_seconds, f.wall_seconds, f.tokens_per_second, f.flops_per_second, f.peak_memory_bytes,
  a.attempts, a.host, a.device, a.device_name, a.ranks, a.threads, a.micro_batch, a.python, a.versions, a.commit,
  a.diff is not null as modified,
  r.code, r.corpus, r.tokenizer, r.train_rows, r.validation, r.validation_rows, r.sequence_length,
  'data=' || replace(r.corpus, ' ', '_') || ' validation=' || r.validation || ' tokenizer=' || r.tokenizer
    || ' context=' || cast(r.sequence_length as varchar) as comparison_key
from runs r
left join finished f on f.home = r.home and f.run_id = r.run_id
left join latest_attempts a on a.home = r.home and a.run_id = r.run_id
left join cores c on c.home = r.home and c.run_id = r.run_id and c.recency = 1
union all
select
  i.home, i.run_id, 'import', i.label, i.recipe, i.depth, i.seed, i.horizon, i.status, i.reason, i.flags, i.usable,
  i.parameters_wte, i.parameters_value_embeds, i.parameters_lm_head, i.parameters_matrices, i.parameters_scalars,
  i.parameters_scaling, i.parameters_total, i.flops_per_token,
  i.tokens_asked, null, null, i.batch_tokens, i.steps, null,
  i.tokens, i.flops, i.train_loss, i.val_loss, i.val_bpb, i.core, null,
  case when i.core is not null then 'core' end, null,
  case when i.core is not null then
    coalesce('axis=' || replace(o.axis, ' ', '_'), 'import=' || i.hash) || ' metric=core'
    || coalesce(' tokenizer=' || replace(i.tokenizer, ' ', '_'), '')
    || coalesce(' context=' || cast(i.sequence_length as varchar), '')
  end,
  i.train_seconds, i.wall_seconds, i.tokens_per_second, i.flops_per_second, i.peak_memory_bytes,
  null, i.host, null, i.device_name, i.ranks, null, null, null, null, i.commit, null,
  null, i.corpus, i.tokenizer, null, i.validation, null, i.sequence_length,
  coalesce('axis=' || replace(o.axis, ' ', '_'), 'import=' || i.hash)
    || coalesce(' data=' || replace(i.corpus, ' ', '_'), '')
    || coalesce(' validation=' || replace(i.validation, ' ', '_'), '')
    || coalesce(' tokenizer=' || replace(i.tokenizer, ' ', '_'), '')
    || coalesce(' context=' || cast(i.sequence_length as varchar), '')
from imported i
join imports o on o.home = i.home and o.hash = i.hash
---
create view status as
select r.home, r.run_id, r.recipe, r.depth, r.seed, r.horizon, r.status, r.reason,
       case when r.status <> 'finished' then a.message end as message, m.step, r.steps, r.attempts, r.host
from results r
left join latest_attempts a on a.home = r.home and a.run_id = r.run_id
left join (select home, run_id, max(step) as step from metrics group by home, run_id) m
  on m.home = r.home and m.run_id = r.run_id
where r.source = 'run'
---
create view noise as
select home, recipe, depth, horizon, comparison_key, code, count(*) as n,
       avg(val_bpb) as val_bpb_mean, stddev_samp(val_bpb) as val_bpb_sd,
       case when count(distinct core_key) = 1 then max(core_key) end as core_key, count(core) as core_n,
       case when count(distinct core_key) = 1 then avg(core) end as core_mean,
       case when count(distinct core_key) = 1 then stddev_samp(core) end as core_sd
from results
where status = 'finished' and usable and seed is not null
group by home, recipe, depth, horizon, comparison_key, code
---
create view curves as
select
  m.home, m.run_id, r.depth, m.step,
  max(case when m.name = 'tokens' then m.value end) as tokens,
  max(case when m.name = 'flops' then m.value end) as flops,
  max(case when m.event = 'train' and m.name = 'loss' then m.value end) as loss,
  max(case when m.name = 'lr' then m.value end) as lr,
  max(case when m.name = 'tokens_per_second' then m.value end) as tokens_per_second,
  max(case when m.event = 'train' and m.name = 'train_seconds' then m.value end) as train_seconds,
  max(case when m.name = 'val_bpb' then m.value end) as val_bpb,
  max(case when m.name = 'val_loss' then m.value end) as val_loss,
  max(case when m.name = 'core' then m.value end) as core
from metrics_latest m
join (select home, run_id, depth from runs union all select home, run_id, depth from imported) r
  on r.home = m.home and r.run_id = m.run_id
where m.event in ('train', 'eval', 'core')
group by m.home, m.run_id, r.depth, m.step
---
create view micro_batches as
with tried as (
  select a.device_name, a.ranks, r.depth, r.width, r.sequence_length, r.vocab_size, a.micro_batch, a.evaluation_tokens,
         coalesce(a.reason = 'oom', false) as failed, coalesce(m.step, 0) as step, r.steps
  from attempts a
  join runs r on r.home = a.home and r.run_id = a.run_id
  left join (
    select home, run_id, attempt, max(step) as step from metrics where event = 'train' group by home, run_id, attempt
  ) m on m.home = a.home and m.run_id = a.run_id and m.attempt = a.attempt
),
limits as (
  select device_name, ranks, depth, width, sequence_length, vocab_size,
         min(case when failed and step < steps then micro_batch end) as too_many,
         min(case when failed and step >= steps then evaluation_tokens end) as too_long
  from tried
  group by device_name, ranks, depth, width, sequence_length, vocab_size
)
select
  l.device_name, l.ranks, l.depth, l.width, l.sequence_length, l.vocab_size,
  greatest(max(case when not t.failed and t.step > 0 and t.micro_batch < l.too_many then t.micro_batch end),
           cast(floor(l.too_many / 2.0) as bigint)) as training,
  greatest(max(case when not t.failed and t.step >= t.steps and t.evaluation_tokens < l.too_long
                    then t.evaluation_tokens end),
           cast(floor(l.too_long / 2.0) as bigint)) as evaluation_tokens
from limits l
join tried t on t.device_name = l.device_name and t.ranks = l.ranks and t.depth = l.depth and t.width = l.width
  and t.sequence_length = l.sequence_length and t.vocab_size = l.vocab_size
where l.too_many is not null or l.too_long is not null
group by l.device_name, l.ranks, l.depth, l.width, l.sequence_length, l.vocab_size, l.too_many, l.too_long
