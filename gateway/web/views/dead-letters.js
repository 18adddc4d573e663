// Dead letters: their causes, and their replay after a preview.

import { html, useEffect, useState } from '../vendor/htm-preact.js';
import { act, read } from '../api.js';
import { t, tOr } from '../i18n.js';
import { useResource } from '../resource.js';
import { curl, curlPost, dev } from '../shell.js';
import { Dialog, OrderLink, ProblemNote, Shell, LoadingRows, When, announce } from '../ui.js';

const PAGE = 50;
/// Outcomes of a dry run for which a replay makes sense; the others would fail as before.
const USEFUL = ['applied', 'nothing_to_do'];

/// `setAside`: the current number per available service. The list is read again when it changes.
export function DeadLetters({ setAside }) {
  const { data, problem, reload } = useResource(`/v1/ops/dead-letters?limit=${PAGE}`, setAside);
  const [olderProblem, setOlderProblem] = useState();
  const [older, setOlder] = useState([]);
  const [chosen, setChosen] = useState();
  const letters = data && [...data.items, ...older.flatMap((page) => page.items)];
  const next = older.length ? older.at(-1).next_cursor : data?.next_cursor;
  const open = letters?.filter((letter) => letter.waits) ?? [];
  const loadMore = async () => {
    try {
      const page = await read(`/v1/ops/dead-letters?limit=${PAGE}&cursor=${next}`);
      // Ignored if the list has restarted meanwhile, or if this page was requested twice.
      setOlder((before) => (before === older ? [...older, page] : before));
      setOlderProblem(undefined);
    } catch (failed) {
      setOlderProblem(failed);
    }
  };
  const done = () => {
    setOlder([]);
    setOlderProblem(undefined);
    reload();
  };
  return html`<section class="card card-flush" aria-labelledby="dead-letters" data-test="dead-letters">
    <div class="card-head">
      <h2 id="dead-letters" class="card-title">${t('dlq.title')}</h2>
      ${open.length > 1 && html`<button type="button" class="button" onClick=${() => setChosen(open)} data-test="replay-all">${t('dlq.preview-all', { n: open.length })}</button>`}
    </div>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    ${!letters && !problem && html`<${LoadingRows} rows=${2} />`}
    ${data?.unavailable.map((service) => html`<div key=${service} class="note note-waiting" role="status" data-test="letters-missing"><strong>${t('timeline.missing', { service })}</strong><p>${t('dlq.missing')}</p></div>`)}
    ${letters && !letters.length && !data.unavailable.length && html`<p class="empty">${t('dlq.none')}</p>`}
    <ul class="letters">${letters?.map((letter) => html`<${Letter} key=${letter.id} letter=${letter} onReplay=${() => setChosen([letter])} />`)}</ul>
    ${olderProblem && html`<${ProblemNote} problem=${olderProblem} />`}
    ${next && html`<p class="card-foot"><button type="button" class="button" onClick=${loadMore} data-test="more">${t('more')}</button></p>`}
    ${chosen && html`<${Replay} letters=${chosen} onDone=${done} onClose=${() => setChosen(undefined)} />`}
  </section>`;
}

function Letter({ letter, onReplay }) {
  return html`<li class=${`letter ${letter.waits ? '' : 'is-done'}`} data-row data-test="letter" data-id=${letter.id} data-waits=${String(letter.waits)}>
    <div class="letter-head">
      <span class="badge badge-kind-${letter.kind}">${tOr(`dlq.${letter.kind}`, letter.kind)}</span>
      <span class="badge badge-${letter.service}">${letter.service}</span>
      ${letter.order_id && html`<${OrderLink} id=${letter.order_id} />`}
      <span class="quiet"><${When} at=${letter.last_seen_at} /> · ${t('dlq.times', { n: letter.times })}</span>
      ${letter.waits
        ? html`<button type="button" class="button" onClick=${onReplay} data-test="replay">${t('dlq.preview')}</button>`
        : html`<span class="quiet">${t('dlq.applied')} ${letter.replayed_at && html`<${When} at=${letter.replayed_at} />`}</span>`}
    </div>
    <p class="letter-cause" lang="en">${letter.cause}</p>
    <details><summary>${t('timeline.message')}</summary>
      <p class="quiet"><code>${letter.subject}</code> · ${letter.stream} #${letter.stream_sequence} · <code>${letter.consumer}</code></p>
      <pre class="payload" tabindex="0">${letter.headers}</pre>
      <pre class="payload" tabindex="0">${letter.payload}</pre>
      <${Shell} commands=${[curlPost(`/v1/ops/dead-letters/${letter.id}/replay?dry_run=true`), dev(`dlq show ${letter.id}`), dev(`dlq replay --dry-run ${letter.id}`)]} />
    </details>
  </li>`;
}

/// Shows the result of a dry run first; only then a replay is possible.
function Replay({ letters, onDone, onClose }) {
  const [preview, setPreview] = useState();
  const [results, setResults] = useState();
  const [problem, setProblem] = useState();
  const replay = async (which, dryRun) => {
    const replays = [];
    for (const { id } of which) replays.push(await act(`/v1/ops/dead-letters/${id}/replay?dry_run=${dryRun}`));
    return replays;
  };
  const useful = preview?.filter(({ outcome }) => USEFUL.includes(outcome)) ?? [];
  const apply = async () => {
    try {
      const done = await replay(useful, false);
      setResults(done);
      announce(summary(done));
    } catch (refused) {
      setProblem(refused);
    }
    onDone();
  };
  useEffect(() => {
    replay(letters, true).then(setPreview, setProblem);
  }, []);
  const shown = results ?? preview;
  return html`<${Dialog} title=${t('dlq.title')} onClose=${onClose} data-test="replay-dialog">
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    ${!shown && !problem && html`<${LoadingRows} rows=${2} />`}
    ${shown && html`
      <p><strong data-test="replay-summary">${results ? t('dlq.did') : t('dlq.would')} ${summary(shown)}</strong></p>
      <ul class="previews" tabindex="0">${shown.map((one) => html`<li key=${one.id} data-test="preview" data-outcome=${one.outcome}><span class="badge">${t(`replay.${one.outcome}`)}</span> <span lang="en">${one.detail}</span></li>`)}</ul>
      ${results
        ? html`<button type="button" class="button button-main" onClick=${(event) => event.target.closest('dialog').close()}>${t('close')}</button>`
        : useful.length
          ? html`<button type="button" class="button button-main" onClick=${apply} data-test="replay-apply">${t('dlq.apply', { n: useful.length })}</button>`
          : html`<p data-test="replay-useless">${t('dlq.useless')}</p>`}`}
    <${Shell} commands=${[curl('/v1/ops/dead-letters'), dev('dlq replay --dry-run')]} />
  <//>`;
}

function summary(outcomes) {
  const counts = new Map();
  for (const { outcome } of outcomes) counts.set(outcome, (counts.get(outcome) ?? 0) + 1);
  return [...counts].map(([outcome, n]) => `${t(`replay.${outcome}`)}: ${n}`).join(', ');
}
