-- What people ask. Standard SQL: DuckDB and PostgreSQL both speak it. Views are separated by a line of dashes.

create view latest_attempts as
select * from (
  select a.*, row_number() over (partition by run_id order by attempt desc) as recency,
         count(*) over (partition by run_id) as attempts
  from attempts a
) ranked
where recency = 1
---
create view metrics_latest as
select run_id, attempt, event, time, step, name, value from (
  select m.*, row_number() over (partition by run_id, event, step, name order by attempt desc, time desc) as recency
  from metrics m
) ranked
where recency = 1
---
create view results as
select
  r.run_id, r.recipe, r.depth, r.seed, r.horizon,
  case
    when f.run_id is not null then 'finished'
    when a.reason in ('interrupted', 'diverged', 'cancelled') then a.reason
    when a.ended is not null then 'failed'
    when a.run_id is not null then 'running'
    else 'planned'
  end as status,
  case when f.run_id is null then a.reason end as reason,
  r.parameters_wte, r.parameters_value_embeds, r.parameters_lm_head, r.parameters_matrices, r.parameters_scalars,
  r.parameters_scaling, r.parameters_total, r.flops_per_token,
  r.tokens_asked, r.tokens as tokens_planned, r.flops as flops_planned, r.batch_tokens, r.steps, r.epochs,
  f.tokens, f.flops, f.train_loss, f.val_loss, f.val_bpb, f.core,
  f.train_seconds, f.wall_seconds, f.tokens_per_second, f.flops_per_second, f.peak_memory_bytes,
  a.attempts, a.host, a.device, a.device_name, a.ranks, a.threads, a.micro_batch, a.python, a.versions, a.commit,
  a.diff is not null as modified,
  r.code, r.corpus, r.tokenizer, r.train_rows, r.validation, r.validation_rows, r.sequence_length,
  'validation=' || r.validation || ' tokenizer=' || r.tokenizer
    || ' context=' || cast(r.sequence_length as varchar) as comparison_key
from runs r
left join finished f on f.run_id = r.run_id
left join latest_attempts a on a.run_id = r.run_id
---
create view curves as
select
  m.run_id, r.depth, m.step,
  max(case when m.name = 'tokens' then m.value end) as tokens,
  max(case when m.name = 'flops' then m.value end) as flops,
  max(case when m.event = 'train' and m.name = 'loss' then m.value end) as loss,
  max(case when m.name = 'lr' then m.value end) as lr,
  max(case when m.name = 'tokens_per_second' then m.value end) as tokens_per_second,
  max(case when m.event = 'train' and m.name = 'train_seconds' then m.value end) as train_seconds,
  max(case when m.name = 'val_bpb' then m.value end) as val_bpb,
  max(case when m.name = 'val_loss' then m.value end) as val_loss
from metrics_latest m
join runs r on r.run_id = m.run_id
where m.event in ('train', 'eval')
group by m.run_id, r.depth, m.step
---
create view micro_batches as
with tried as (
  select a.device_name, a.ranks, r.depth, r.width, r.sequence_length, r.vocab_size, a.micro_batch, a.evaluation_tokens,
         coalesce(a.reason = 'oom', false) as failed, coalesce(m.step, 0) as step, r.steps
  from attempts a
  join runs r on r.run_id = a.run_id
  left join (select run_id, attempt, max(step) as step from metrics where event = 'train' group by run_id, attempt) m
    on m.run_id = a.run_id and m.attempt = a.attempt
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
