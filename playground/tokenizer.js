// Byte-level BPE in the manner of GPT-2: words into bytes, bytes into pieces by a list of merges.

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** Each byte as a visible letter: most as themselves, the others from 256 on. */
function letters() {
  const isVisible = (byte) =>
    (byte > 32 && byte < 127) || (byte > 160 && byte < 256 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) =>
    String.fromCharCode(isVisible(byte) ? byte : next++),
  );
}

/** A tokenizer of a vocabulary {piece: number} and merges [[left, right], …]. */
export function makeTokenizer(vocabulary, merges) {
  const letterOf = letters();
  const byteOf = new Map(letterOf.map((letter, byte) => [letter, byte]));
  const rank = new Map(merges.map((pair, i) => [pair.join(" "), i]));
  const pieces = [];
  for (const [piece, number] of Object.entries(vocabulary)) pieces[number] = piece;
  const known = new Map(); // words that were split before

  function split(word) {
    if (known.has(word)) return known.get(word);
    let parts = Array.from(new TextEncoder().encode(word), (byte) => letterOf[byte]);
    for (;;) {
      let best = Infinity;
      for (let i = 1; i < parts.length; i++)
        best = Math.min(best, rank.get(`${parts[i - 1]} ${parts[i]}`) ?? Infinity);
      if (best === Infinity) break;
      const [left, right] = merges[best];
      const joined = [];
      for (let i = 0; i < parts.length; i++) {
        const isPair = parts[i] === left && parts[i + 1] === right;
        joined.push(isPair ? left + right : parts[i]);
        if (isPair) i++;
      }
      parts = joined;
    }
    const numbers = parts.map((part) => vocabulary[part]);
    known.set(word, numbers);
    return numbers;
  }

  return {
    encode: (text) => [...text.matchAll(WORDS)].flatMap(([word]) => split(word)),
    /** Whether a token begins amid the bytes of a letter. */
    isInside: (number) => (byteOf.get(pieces[number][0]) & 0xc0) === 0x80,
    /** The text of some tokens; half a letter shows as �. */
    decode(numbers) {
      const bytes = numbers.flatMap((n) => Array.from(pieces[n], (letter) => byteOf.get(letter)));
      return new TextDecoder().decode(Uint8Array.from(bytes));
    },
  };
}
